"""Configuration files of a model folder: JSON, untrusted, bounded in size."""

import json
from pathlib import Path
from typing import Any

from flashvec.runtime.checkpoint.source import CheckpointError

MAX_BYTES = 16 * 2**20  # an LLM's config.json has some KB; one that lists a vocabulary's added tokens some hundred


def read_json(path: Path) -> Any:
    """A file's value; parsed, nothing else.

    Raises:
        CheckpointError: missing, too large or not JSON; names the file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes, more than a configuration can have")
    try:
        values = json.loads(path.read_bytes())  # in whatever encoding JSON may have, with its mark or without
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text: no path, no prompt has it
        return values
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds an object.

    Raises:
        CheckpointError: as `read_json`, or another kind of value.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values
