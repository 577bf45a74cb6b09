"""Where a long text may be cut before it is tokenised, so that what is left has the same first tokens.

Tokenising a megabyte to keep 512 tokens costs thousands of times what it has to. A cut is exact where nothing
in the tokenizer reaches across it: no added token, no normalisation, and either the pre-tokenizer always splits
there, or the vocabulary has no token over it, so that no merge can make one. All three are read off the
tokenizer; one with a part not known here gets no boundary, and its texts are tokenised whole.

A boundary stands between a letter or digit and a space (or a CJK stop) that another letter or digit follows.
"""

import json
import re
from typing import Any

from tokenizers import Tokenizer, models

_ASCII = "0-9A-Za-z"
_LETTERS = _ASCII + "\u4e00-\u9fa5"  # ideographs: \p{L} in every version of Unicode, and none composes
_STOPS = "\uff0c\u3002\u3001"  # full-width comma, ideographic full stop and comma
_STOPS_NORMALIZED = ",." + _STOPS

# Normalizers that reach no further than a character and its accents. Replace is judged by its pattern.
_LOCAL_NORMALIZERS = frozenset(("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend"))

# Alternatives of the splitting patterns of GPT-2, cl100k, o200k, Llama 3, Qwen 2 to 3.5, Tekken and DeepSeek.
# Checked for each: no match holds a letter or digit with a space or stop after it, and the only look-ahead is
# \s+(?!\S), which looks at one character after a space.
_ALTERNATIVES = frozenset(
    (
        *("'s", "'t", "'re", "'ve", "'m", "'ll", "'d"),
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"'(?i:[sdmt]|ll|ve|re)",
        r" ?\p{L}+",
        r" ?\p{N}+",
        r"\p{L}+",
        r"\p{N}+",
        r"\p{N}",
        r"\p{N}{1,3}",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"[^\r\n\p{L}\p{N}]?+\p{L}+",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        r"\s*[\r\n]+",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_ANY_STOP = tuple(a for a in _ALTERNATIVES if a.startswith((r" ?[^\s", r" ?[\p{P}")))  # match at every stop


def boundary_pattern(backend: Tokenizer) -> re.Pattern[str] | None:
    """A pattern whose every match starts at a place where a text may be cut for this tokenizer.

    `backend.encode(text[:match.start()])` gives a prefix of `backend.encode(text)`, the template's tokens
    aside. Goes through the vocabulary: call it once per tokenizer.

    Returns:
        None where no such place is known.
    """
    normalizers = _stages(backend.normalizer, "normalizers")
    if not all(_is_local(stage) for stage in normalizers):
        return None
    stops = "".join(stop for stop in _STOPS if _is_boundary(backend, _LETTERS, stop))
    if _is_boundary(backend, _LETTERS, " "):
        left, right = _LETTERS, " " + stops
    elif _is_boundary(backend, _ASCII, " "):
        left, right = _ASCII, " " + stops
    else:
        left, right = _LETTERS, stops
    # The class first: a search for a look-behind would stop at every character.
    return re.compile(f"[{right}](?=[{left}])(?<=[{left}].)") if right else None


def _is_boundary(backend: Tokenizer, letters: str, right: str) -> bool:
    """May a text be cut between any of `letters` and a `right` that one of them follows?"""
    seen = _seen_as(backend, letters, right)
    if not seen:
        return False
    crossing = re.compile(f"[{letters}][{seen}{right}]")
    if any(crossing.search(content) for content in _added_contents(backend)):
        return False
    stages = _stages(backend.pre_tokenizer, "pretokenizers")
    splits = _splits(stages, letters, right, seen)
    model = backend.model
    if isinstance(model, models.BPE) and model.dropout:
        return False  # random: no two runs agree
    if splits is None or splits:
        return bool(splits)
    if any(stage["type"] == "Metaspace" for stage in stages):
        seen = seen.replace(" ", "▁")
    return _has_no_token_over(backend, letters, seen)


def _has_no_token_over(backend: Tokenizer, letters: str, seen: str) -> bool:
    """Given both sides in one piece, can the model never make a token that lies on both?"""
    model, vocab = backend.model, backend.get_vocab()
    last = letters
    if isinstance(model, models.BPE):
        if model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix:
            return False  # what a piece becomes may depend on where it ends
        if not model.unk_token or model.unk_token not in vocab:
            return False  # unknown characters are dropped: their neighbours meet and may merge
        last += ">" + re.escape(model.unk_token[-1])  # an unknown letter becomes bytes, "<0x41>", or this
    elif not isinstance(model, models.Unigram):
        return False
    crossing = re.compile(f"[{last}][{seen}]")
    return all(char in vocab for char in seen) and not any(crossing.search(token) for token in vocab)


def _added_contents(backend: Tokenizer) -> list[str]:
    """Added tokens as they are looked for in a text: before normalisation, and as normalised."""
    found = [token.content for token in backend.get_added_tokens_decoder().values()]
    return found if backend.normalizer is None else found + [backend.normalizer.normalize_str(c) for c in found]


def _seen_as(backend: Tokenizer, letters: str, right: str) -> str:
    """What `right` becomes by normalisation; empty if it, or a letter before it, becomes something else."""
    expected = " ▁" if right == " " else _STOPS_NORMALIZED
    sample = "".join(char + right for char in _members(letters)) + "a"
    if backend.normalizer is not None:
        sample = backend.normalizer.normalize_str(sample)
    if not re.fullmatch(f"▁?(?:[{letters}][{expected}])+a", sample):
        return ""
    return "".join(sorted(set(sample) & set(expected)))


def _members(classes: str) -> str:
    """All characters of a class such as `0-9A-Z`."""
    return "".join(chr(c) for a, b in re.findall("(.)-(.)", classes) for c in range(ord(a), ord(b) + 1))


def _stages(part: Any, key: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as flat list of its steps, each as tokenizer.json writes it."""
    if part is None:
        return []
    pending, found = [json.loads(part.__getstate__())], []
    while pending:
        stage = pending.pop(0)
        if stage["type"] == "Sequence":
            pending = stage[key] + pending
        else:
            found.append(stage)
    return found


def _is_local(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL_NORMALIZERS
    pattern = normalizer["pattern"]
    if "Regex" in pattern:
        return pattern["Regex"] == " {2,}"  # needs two spaces: a boundary has one
    text = pattern["String"]
    return text == " " or not re.search(f"[{_LETTERS} {_STOPS_NORMALIZED}]", text)


def _splits(stages: list[dict[str, Any]], letters: str, right: str, seen: str) -> bool | None:
    """Does the pre-tokenizer surely split before `right`? None: it may do what cannot be judged here."""
    for stage in stages:  # once split, the two sides never meet again: later steps need no look
        kind = stage["type"]
        if kind == "ByteLevel":
            # Without its pattern it only spells bytes: "a" and "Ġ" could then merge.
            return True if stage["use_regex"] and seen != "▁" else None
        if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
            if seen == " ":
                return True
            if kind != "WhitespaceSplit":
                return None
        elif kind == "Metaspace":
            if stage["replacement"] != "▁":
                return None
            if right == " " and stage["split"]:
                return True
            seen = seen.replace(" ", "▁")
        elif kind == "Split":
            splits = _pattern_splits(stage, letters, right, seen)
            if splits is None or splits:
                return splits
        elif kind != "Digits":
            return None
    return False


def _pattern_splits(stage: dict[str, Any], letters: str, right: str, seen: str) -> bool | None:
    pattern = stage["pattern"]
    if "String" in pattern:
        return None if re.search(f"[{letters}{seen}]", pattern["String"]) else False
    if (stage["behavior"], stage["invert"]) not in (("Isolated", False), ("Removed", True)):
        return None
    alternatives = _alternatives(pattern["Regex"])
    if not _ALTERNATIVES.issuperset(alternatives):
        return None
    if right == " ":
        return r"\s+" in alternatives and seen == " "
    return any(alternative in alternatives for alternative in _ANY_STOP)


def _alternatives(pattern: str) -> list[str]:
    """A regular expression cut at its outermost `|`."""
    found, start, depth, in_class, at = [], 0, 0, False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and depth == 0:
            found.append(pattern[start:at])
            start = at + 1
        at += 1
    return [*found, pattern[start:]]
