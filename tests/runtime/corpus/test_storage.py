import io
import os
import stat
from pathlib import Path

import pytest

from flashvec.runtime.corpus import storage as module
from flashvec.runtime.corpus.storage import Storage, open_uri


def test_a_file_is_private_until_it_is_whole(tmp_path):
    storage = Storage(tmp_path / "job")
    storage.make("_manifest")
    staged = storage.stage("_manifest/00000.json")
    staged.file.write(b"{}")
    staged.file.flush()
    (temporary,) = (tmp_path / "job" / "_manifest").iterdir()
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o600 and storage.names("_manifest") == []
    staged.commit()
    staged.discard()
    assert storage.names("_manifest") == ["00000.json"] and storage.read("_manifest/00000.json") == b"{}"
    (path,) = (tmp_path / "job" / "_manifest").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) & 0o177 == stat.S_IMODE(0o666 & ~_umask()) & 0o177


def test_a_file_in_the_way_of_the_folder_is_named(tmp_path):
    (tmp_path / "taken").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    for place, held in (("taken", "taken"), ("taken/job", "taken"), ("lost", "lost")):
        named = rf"out is {tmp_path}/{place}, and {tmp_path}/{held} is no folder: give another"
        with pytest.raises(ValueError, match=named):
            Storage(tmp_path / place).make("_manifest")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(module.os, name, lambda *a, real=real, name=name: (calls.append(name), real(*a))[1])
    storage = Storage(tmp_path)
    storage.write("a", b"x")
    assert calls == ["fsync", "rename", "fsync"]


def test_made_folders_are_synced_up_to_what_was_there(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append(Path(path)))
    storage = Storage(tmp_path / "a" / "b")
    storage.make("c")
    assert (tmp_path / "a" / "b" / "c").is_dir()
    assert sorted(synced) == [
        tmp_path,
        tmp_path / "a",
        tmp_path / "a" / "b",
    ]  # each holds the name of what was made in it


def test_sweep_takes_only_its_own(tmp_path):
    storage = Storage(tmp_path)
    left = [storage.stage(name) for name in ("part-00000.parquet", "part-00001.parquet")]
    (tmp_path / ".part-00000.parquet.tmp").touch()
    storage.sweep("", {"part-00000.parquet"}.__contains__)
    kept = {path.name for path in tmp_path.iterdir()}
    assert len(kept) == 2 and ".part-00000.parquet.tmp" in kept
    for staged in left:
        staged.discard()


def test_secrets_are_refused_and_not_repeated():
    with pytest.raises(ValueError, match="holds a secret") as refused:
        open_uri("s3://key:hunter2@bucket/x")
    assert "hunter2" not in str(refused.value)
    for query in (
        "secret_key=hunter2",
        "SECRET_KEY=hunter2",
        "client_id=a&tenant_id=b&client_secret=hunter2",
        "sv=2022&sig=hunter2",
        "access_token=hunter2",
        "endpoint_override=http://user:hunter2@host",
    ):
        for scheme in ("s3", "abfs"):
            with pytest.raises(ValueError, match="holds a secret") as refused:
                open_uri(f"{scheme}://bucket/x?{query}")
            assert "hunter2" not in str(refused.value)
    with pytest.raises(ValueError, match="cannot open"):
        open_uri("gopher://x/y")


def test_a_link_in_the_way_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(module.secrets, "token_hex", lambda n: "0" * 12)
    (tmp_path / f".a.{os.getpid()}-{'0' * 12}.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        Storage(tmp_path).stage("a")
    assert not (tmp_path / "victim").exists()


def test_stopped_while_it_sends_nothing_appears_behind_a_uri():
    """A signal, or a fault of the disk, between two blocks: half a plan would block the job until it is deleted."""

    class Stopped(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise KeyboardInterrupt
            return super().read(size)

    storage = Storage("mock:///bucket/out")
    storage.filesystem.create_dir(storage.base)  # which a store needs not
    with pytest.raises(KeyboardInterrupt):
        storage.send("plan.json", Stopped(bytes(9 << 20)))
    assert storage.size("plan.json") is None
    storage.send("plan.json", io.BytesIO(b"{}"))
    assert storage.size("plan.json") == 2
