"""Settings as plain values: read from YAML or JSON, overridden one by one, built into a tree of frozen dataclasses.

Values are what the dataclasses' annotations say: bool, int, float, str, one of several words, a list of these, None
where that is allowed, and another dataclass. A key that is unknown, missing, of another type, or there twice is an
error.
"""

import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_CONFIG_BYTES = 1 << 20


class ConfigError(ValueError):
    """A training configuration that cannot be followed; names the key and the cure."""


@dataclass(frozen=True)
class Places:
    """Where a key has its value from: the file, or the override that was given for it or for what it lies in."""

    file: str
    overrides: Mapping[str, str]

    def of(self, key: str) -> str:
        parts = key.partition("[")[0].split(".")
        above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((self.overrides[name] for name in above if name in self.overrides), self.file)


def to_yaml(config: Any) -> str:
    """The whole tree, as `--print-config` shows it and `read_config` takes it back."""
    return _yaml().safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, tuple | list) else value


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ConfigError("YAML needs the package pyyaml: pip install 'flashvec[train]', or write JSON") from None
    return yaml


def read_values(path: Path) -> dict[str, Any]:
    """The keys and values of a .yaml, .yml or .json file, unchecked.

    Raises:
        ConfigError: names the file.
    """
    if not path.is_file():
        what = "a folder; name a .yaml or .json file of settings" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {what}")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path.name}: {path.stat().st_size} bytes, more than a configuration can have")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if path.suffix == ".json":
        try:
            values = json.loads(text, object_pairs_hook=partial(_once, path.name))
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name}: not valid JSON ({error})") from None
    elif path.suffix in (".yaml", ".yml"):
        values = parse(text, path.name)
    else:
        raise ConfigError(f"{path.name}: give a .yaml or .json file")
    if not isinstance(values, dict):
        raise ConfigError(f"{path.name}: expected keys and values")
    return values


def parse_for(cls: type[Any], key: str, text: str, where: str) -> Any:
    """An override's value: of a setting that is a text as it stands, with or without quotes, of others its YAML."""
    hint: Any = cls
    for part in key.split("."):
        hint = get_type_hints(hint).get(part) if is_dataclass(hint) else None
    optional = hint == str | None
    if (hint is not str and not optional) or text.strip()[:1] in ("'", '"'):
        return parse(text, where)
    return None if optional and text.strip() in ("", "~", "null") else text


def parse(text: str, where: str) -> Any:
    yaml = _yaml()
    try:
        values = yaml.safe_load(text)
        _check_keys(yaml, yaml.compose(text, yaml.SafeLoader), where)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    return values


def _check_keys(yaml: Any, root: Any, where: str) -> None:
    """YAML's loader takes the last of two values for one key, in silence."""
    left, seen = [root], set[int]()
    while left:
        node = left.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias may lead back to it
        if isinstance(node, yaml.MappingNode):
            _once(where, [(key.value if isinstance(key, yaml.ScalarNode) else id(key), 0) for key, _ in node.value])
            left += [value for _, value in node.value]
        else:
            left += node.value


def _once(where: str, items: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    """Keys and values, no key twice."""
    values = {}
    for key, value in items:
        if key in values:
            raise ConfigError(f"{where}: {key} is there twice: keep one")
        values[key] = value
    return values


def set_value(values: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{override!r}: {parent} holds {inner!r}, no keys")
        values = inner
    values[last] = value


def build_tree(cls: type[Any], values: Any, places: Places, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        where = places.of(prefix.rstrip("."))
        raise ConfigError(f"{where}: {prefix.rstrip('.') or 'the file'} is {values!r}; expected keys and values")
    hints = get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}
    unknown = [key for key in values if key not in known]
    if unknown:
        where = places.of(f"{prefix}{unknown[0]}")
        raise ConfigError(f"{where}: {prefix}{unknown[0]} is unknown; known are {', '.join(prefix + k for k in known)}")
    made = {}
    for name in known:
        if name in values:
            made[name] = _convert(hints[name], values[name], places, prefix + name)
    try:
        return cls(**made)
    except TypeError as error:  # only a missing key is left
        missing = ", ".join(part for part in str(error).split("'")[1::2])
        raise ConfigError(f"{places.file}: {prefix}{missing} is missing") from None


def _convert(hint: Any, value: Any, places: Places, key: str) -> Any:
    """`value` as the hint wants it: whole numbers pass for floats, "1e-4" (no float in YAML) too, a str for a list."""
    if is_dataclass(hint):
        return build_tree(hint, value, places, key + ".")  # type: ignore[arg-type]
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (h for h in get_args(hint) if h is not type(None))
        return _convert(inner, value, places, key)
    if origin is Literal:
        if value in get_args(hint):
            return value
        raise ConfigError(f"{places.of(key)}: {key} is {value!r}; one of {', '.join(map(str, get_args(hint)))}")
    if origin is tuple:
        items = [value] if isinstance(value, str | int | float) and not isinstance(value, bool) else value
        if isinstance(items, list | tuple):
            return tuple(_convert(get_args(hint)[0], item, places, f"{key}[{i}]") for i, item in enumerate(items))
        raise ConfigError(f"{places.of(key)}: {key} is {value!r}; expected a list")
    if hint is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif type(value) is hint:
        return value
    raise ConfigError(f"{places.of(key)}: {key} is {value!r}; expected {hint.__name__}")
