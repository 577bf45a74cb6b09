"""Configuration files that are no configuration."""

import pytest

from flashvec.runtime.checkpoint.json_files import MAX_BYTES, read_json, read_object
from flashvec.runtime.checkpoint.source import CheckpointError


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xff", b"[" * 100_000, b'{"prompts": {"query": "\\ud800 "}}', b'{"\\udc00": 1}'],
    ids=["empty", "cut off", "no text", "too deep", "half a surrogate pair", "half a pair as a key"],
)
def test_what_is_no_json_of_text_is_an_error_that_names_the_file(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        read_json(path)


def test_whole_pairs_and_every_encoding_of_json_are_read(tmp_path):
    path = tmp_path / "config.json"
    for content in (b'{"a": "\\ud83d\\udc15"}', '{"a": "🐕"}'.encode("utf-16"), '\ufeff{"a": "🐕"}'.encode()):
        path.write_bytes(content)
        assert read_object(path) == {"a": "🐕"}


def test_a_file_larger_than_any_configuration_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than a configuration"):
        read_json(path)
