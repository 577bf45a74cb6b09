"""Small tokenizers of every form in use, trained on a few lines, and texts that are hard on them."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from flashvec.runtime.tokenize import Tokenizer, Tokens

CORPUS = [
    "the cat sat on the mat and the dog ran over the red bridge, the cat said: it's 1234 o'clock!",
    "hello world, hello there; numbers 12 345 6789 and code x = y + 1\n\tdef f(self): return None",
    "straße naïve café Zürich 10 % of €20, cafe\u0301 and fiancée",
    "东京都是日本的首都，人口很多。今天天气很好、我们去公园。",
    "こんにちは世界 ここは東京です 안녕하세요 세계 привет мир 😀🎉 family 👨‍👩‍👧",
] * 8
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer, normalizer=None, size: int = 600) -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def split_by(*patterns: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def sentencepiece(changes: dict, crossing: bool = False) -> Backend:
    """A BPE with byte fallback, trained on words (or, `crossing`, on whole lines), then given another front end."""
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if crossing:
        backend.normalizer = normalizers.Replace(" ", "▁")
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL + BYTES, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][: len(SPECIAL)]
    backend = Backend.from_str(json.dumps(state | changes))
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return backend


def _with_added() -> Backend:
    """Added tokens of every sort: next to spaces, whole words only, normalised."""
    backend = Backend.from_str(backend_of("metaspace").to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.add_tokens(
        [
            AddedToken("<l>", lstrip=True),
            AddedToken("<r>", rstrip=True, normalized=False),
            AddedToken("cat", single_word=True),
            AddedToken("THE", normalized=True),
            AddedToken("  ", normalized=False),
        ]
    )
    return backend


def _unigram() -> Backend:
    backend = Backend(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 2)])
    return backend


TO_METASPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA2 = {
    "pre_tokenizer": None,
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"}, TO_METASPACE],
    },
}
GEMMA = {
    "normalizer": TO_METASPACE,
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    },
}
NO_SPLIT = {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}}
KINDS = {
    "gpt2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "gpt2_trimmed": lambda: byte_level(pre_tokenizers.ByteLevel(), normalizers.Lowercase()),
    "llama3": lambda: byte_level(split_by(LLAMA3)),
    "qwen": lambda: byte_level(split_by(QWEN), normalizers.NFC()),
    "o200k": lambda: byte_level(split_by(O200K), normalizers.NFKC()),
    "smollm": lambda: byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        normalizers.Strip(),
    ),
    "deepseek": lambda: byte_level(split_by(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK)),
    "added": _with_added,
    "metaspace": lambda: sentencepiece({}),
    "metaspace_no_split": lambda: sentencepiece(NO_SPLIT),
    "llama2": lambda: sentencepiece(LLAMA2),
    "gemma": lambda: sentencepiece(GEMMA),
    "unigram": _unigram,
}


@cache
def backend_of(kind: str) -> Backend:
    return KINDS[kind]()


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return Tokenizer.from_backend(backend_of(kind), bos_id=1, eos_id=2, unk_id=0)


TEXTS = [
    "the cat sat on the mat",
    " leading and  double  spaces ",
    "",
    " ",
    "\n\n\t",
    "naïve café cafe\u0301 ﬁne ½",
    "东京都是日本的首都，人口很多。",
    "a 😀 b 👨‍👩‍👧 c",
    "stop </s> and <s>go</s>",
    "x" * 50,
    "it's 1234567 o'clock, isn't it?",
]


def write_folder(folder: Path, backend: Backend, config: dict) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def rows_of(tokens: Tokens) -> list[list[int]]:
    return [row.tolist() for row in np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])]
