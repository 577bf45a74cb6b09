"""File systems that cannot make a folder's names durable."""

import errno
import os
import stat

import pytest

from flashvec.runtime.durable import sync


@pytest.mark.parametrize(("code", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_folder_is_synced_where_its_file_system_can_be_asked_to(tmp_path, monkeypatch, code, passes):
    own, synced = os.fsync, []

    def files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        own(handle)
        synced.append(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    (tmp_path / "a").write_text("whole")
    sync(tmp_path / "a")
    assert len(synced) == 1
    if passes:
        sync(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            sync(tmp_path)


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    def none(handle):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", none)
    (tmp_path / "a").write_text("whole")
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        sync(tmp_path / "a")
