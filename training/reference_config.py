"""The reference's own train_configs (LLM2Vec's JSON files for its MNTP, SimCSE and supervised scripts), translated.

They state what differs from Hugging Face's trainer and from the scripts' defaults; those are filled in here: AdamW at
5e-5 with a linear schedule over three epochs, clipping at 1, alpha twice the rank, dropout 0.05. Batches are stated
for one process there: times the number of processes they are ours. Switches of that software (mixed precision,
attention implementations, removed columns) say nothing about the result and are passed over; a key that does say
something and is not known is an error.
"""

import os
from collections.abc import Mapping
from typing import Any

from flashvec.training.settings import ConfigError

MARKS = ("model_name_or_path",)
PASSED_OVER = {
    "do_train", "do_eval", "overwrite_output_dir", "evaluation_strategy", "eval_steps", "save_strategy",
    "per_device_eval_batch_size", "attn_implementation", "save_only_model", "remove_unused_columns",
    "mask_token_type", "data_collator_type", "dataset_config_name", "disable_tqdm", "bf16", "tf32",
}  # fmt: skip
# Before queries of the data sets that its supervised script knows, by their files' names; of two, lines take turns.
E5_INSTRUCTIONS = {
    name: tuple(f"{text}; " for text in texts)
    for name, texts in {
        "allnli": (
            "Given a premise, retrieve a hypothesis that is entailed by the premise",
            "Retrieve semantically similar text",
        ),
        "dureader": ("Given a Chinese search query, retrieve web passages that answer the question",),
        "eli5_question_answer": ("Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",),
        "fever": ("Given a claim, retrieve documents that support or refute the claim",),
        "hotpot_qa": ("Given a multi-hop question, retrieve documents that can help answer the question",),
        "miracl": ("Given a question, retrieve Wikipedia passages that answer the question",),
        "mrtydi": ("Given a question, retrieve Wikipedia passages that answer the question",),
        "msmarco_passage": ("Given a web search query, retrieve relevant passages that answer the query",),
        "msmarco_document": ("Given a web search query, retrieve relevant documents that answer the query",),
        "nq": ("Given a question, retrieve Wikipedia passages that answer the question",),
        "quora_duplicates": (
            "Given a question, retrieve questions that are semantically equivalent to the given question",
            "Find questions that have the same meaning as the input question",
        ),
        "squad": ("Retrieve Wikipedia passages that answer the question",),
        "t2ranking": ("Given a Chinese search query, retrieve web passages that answer the question",),
        "trivia_qa": ("Retrieve Wikipedia passages that answer the question",),
    }.items()
}
WHOLE = (
    *("stop_after_n_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "lora_r"),
    *("warmup_steps", "seed", "save_steps", "logging_steps"),
)
FRACTIONS = ("loss_scale", "learning_rate", "lora_dropout", "simcse_dropout", "mlm_probability")
WORDS = ("mask_token_type", "data_collator_type", "pooling_mode", "torch_dtype", "dataset_name", "output_dir")
COLLATORS = {"default": "bert", "all_mask": "all"}
MASK_TOKENS = {"blank": "_", "mask": "<mask>"}


def is_reference(values: Mapping[str, Any]) -> bool:
    """Is this one of the reference's files rather than ours?"""
    return any(key in values for key in MARKS)


def translate(values: Mapping[str, Any], objective: str, where: str) -> dict[str, Any]:
    """Our keys for the reference's.

    Args:
        objective: name of the configuration class that is wanted.

    Raises:
        ConfigError: a key that is not known here, or a file of another objective.
    """
    if "classifier_dropout" in values:
        raise ConfigError(
            f"{where}: trains a classifier of words, which is no encoder: measure one by flashvec evaluate words, with "
            "--adapter for peft_addr and --shift for retroactive_labels: next_token"
        )
    _check_kinds(values, where)
    left = dict(values)
    take = left.pop
    if not take("bidirectional", objective != "ContrastiveConfig"):  # its MNTP script always is
        raise ConfigError(f"{where}: bidirectional is false, or not there: what is trained here looks both ways")
    if (epochs := take("num_train_epochs", None)) is not None and "stop_after_n_steps" not in left:
        raise ConfigError(f"{where}: num_train_epochs is {epochs}: add stop_after_n_steps, epochs are not counted here")
    steps = take("stop_after_n_steps", 10_000)
    own = take("per_device_train_batch_size", 8) * take("gradient_accumulation_steps", 1)
    made: dict[str, Any] = {
        "model": take("model_name_or_path"),
        "output": take("output_dir", "output"),
        "max_length": take("max_seq_length", 1024 if objective == "MntpConfig" else 512),
        "batch_size": own * int(os.environ.get("WORLD_SIZE", "1")),  # there of each process, here of all
        "lora": {"r": (rank := take("lora_r", 8)), "alpha": 2 * rank, "dropout": take("lora_dropout", 0.05)},
        # Three epochs of its data are many times the steps it takes: its schedule hardly falls.
        "optimizer": {
            "learning_rate": take("learning_rate", 5e-5),
            "warmup_steps": (warmup := take("warmup_steps", 0)),
            "schedule": "linear",
            "decay_steps": max(9 * steps, warmup + 1) if objective != "MntpConfig" else None,
        },
        "loop": {
            "steps": steps,
            "seed": take("seed", 42),
            "save_every": take("save_steps", 200),
            "log_every": take("logging_steps", 10),
            "recompute": take("gradient_checkpointing", False),
        },
    }
    if (dtype := take("torch_dtype", "auto")) != "auto":
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"{where}: torch_dtype is {dtype!r}; training runs in bfloat16 or float32")
        made["dtype"] = dtype
    if (adapter := take("peft_model_name_or_path", None)) is not None:
        made["adapters"] = [adapter]
    if (pooling := take("pooling_mode", None)) is not None:
        made["pooling"] = {"eos_token": "last", "last_token": "last", "bos_token": "cls"}.get(pooling, pooling)
    file = take("dataset_file_path", None)
    name = take("dataset_name", None)
    if objective == "MntpConfig":
        made |= _mntp(left, where)
        made["optimizer"]["schedule"] = "constant"
        made["optimizer"].pop("decay_steps")
    elif objective == "ContrastiveConfig":
        dropout = take("simcse_dropout", 0.1 if name == "Wiki1M" else 0.0)
        made |= {"temperature": 1 / take("loss_scale", 50.0), "attention_dropout": dropout}
        made["texts" if name == "Wiki1M" else "pairs"] = [file] if file else []  # a folder, of pairs
        made["e5_instructions"] = name == "E5"
    else:
        raise ConfigError(f"{where}: the reference has no such objective; its files train mntp or contrastive")
    unknown = [key for key in left if key not in PASSED_OVER]
    if unknown:
        raise ConfigError(f"{where}: {unknown[0]} is not known in the reference's configurations for this objective")
    return made


def _check_kinds(values: Mapping[str, Any], where: str) -> None:
    """What is reckoned with must be numbers, before it is."""
    for keys, kinds, expected in (
        (WHOLE, (int,), "a whole number"),
        (FRACTIONS, (int, float), "a number"),
        (WORDS, (str,), "a word"),
    ):
        for key in keys:
            if key in values and type(values[key]) not in kinds:
                raise ConfigError(f"{where}: {key} is {values[key]!r}; expected {expected}")
    if values.get("loss_scale", 1) <= 0:
        raise ConfigError(f"{where}: loss_scale is {values['loss_scale']}; expected a positive number")


def _mntp(left: dict[str, Any], where: str) -> dict[str, Any]:
    collator = left.get("data_collator_type", "default")
    if collator not in COLLATORS:
        raise ConfigError(f"{where}: data_collator_type is {collator!r}; known are {', '.join(COLLATORS)}")
    kind = left.get("mask_token_type", "blank")
    if kind not in MASK_TOKENS:
        raise ConfigError(f"{where}: mask_token_type is {kind!r}; known are {', '.join(MASK_TOKENS)}")
    return {
        "mask_probability": left.pop("mlm_probability", 0.15),
        "mask_token": MASK_TOKENS[kind],
        "masking": COLLATORS[collator],
        "llm2vec_compat": True,
    }
