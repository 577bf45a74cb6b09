import json

import pytest
import yaml

from flashvec.training.config import ContrastiveConfig, MntpConfig, build, read_config
from flashvec.training.reference_config import is_reference, translate
from flashvec.training.settings import ConfigError, to_yaml

LEAST = {"model": "base", "output": "out"}


def test_file_overrides_and_printed_settings_agree(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: base\noutput: out\ntexts: a.txt\nlora: {r: 8}\noptimizer:\n  learning_rate: 1e-4\n")
    config = read_config(MntpConfig, path, ["lora.r=4", "loop.steps=7", "texts=[b.txt, c.txt]", "lora.targets=q_proj"])
    assert config.lora.r == 4 and config.lora.alpha == 32 and config.loop.steps == 7
    assert config.texts == ("b.txt", "c.txt") and config.lora.targets == ("q_proj",)
    assert config.optimizer.learning_rate == 1e-4  # which YAML takes for a text
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert read_config(MntpConfig, tmp_path / "again.yaml") == config
    (tmp_path / "again.json").write_text(json.dumps(yaml.safe_load(to_yaml(config))))
    assert read_config(MntpConfig, tmp_path / "again.json") == config


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model": "base"}, "output is missing"),
        ({**LEAST, "learning_rate": 1}, "learning_rate is unknown; known are model"),
        ({**LEAST, "lora": {"rank": 4}}, r"lora\.rank is unknown; known are lora\.r"),
        ({**LEAST, "lora": 4}, "lora is 4; expected keys"),
        ({**LEAST, "output": ""}, "output is ''; expected a folder"),
        ({**LEAST, "model": ""}, "model is ''; expected a folder, a .gguf file or a hub id"),
        ({**LEAST, "lora": {"r": "four"}}, r"lora\.r is 'four'; expected int"),
        ({**LEAST, "lora": {"r": 4.5}}, r"lora\.r is 4\.5; expected int"),
        ({**LEAST, "lora": {"r": True}}, r"lora\.r is True; expected int"),
        ({**LEAST, "lora": {"r": 500}}, r"lora\.r is 500; expected 1 to 128"),
        ({**LEAST, "lora": {"targets": ["lm_head"]}}, r"lora\.targets is"),
        ({**LEAST, "lora": {"rslora": "yes"}}, r"lora\.rslora is 'yes'; expected bool"),
        ({**LEAST, "loop": {"steps": 0}}, r"loop\.steps is 0"),
        ({**LEAST, "loop": {"seed": -1}}, r"loop\.seed is -1; expected 0 or more"),
        ({**LEAST, "loop": {"micro_batch_tokens": -1}}, r"loop\.micro_batch_tokens is -1; expected 1 or more"),
        ({**LEAST, "loop": {"activation_gib": -1}}, r"loop\.activation_gib is -1\.0; expected 0 or more"),
        ({**LEAST, "loop": {"evaluate_every": -1}}, r"loop\.evaluate_every is -1; expected 0 or more"),
        ({**LEAST, "optimizer": {"decay_steps": 0}}, r"optimizer\.decay_steps is 0; expected more than optimizer"),
        (
            {**LEAST, "optimizer": {"decay_steps": 5, "warmup_steps": 5}},
            r"decay_steps is 5; expected more than optimizer\.",
        ),
        ({**LEAST, "train": "body", "lora": {"start": "a"}}, r"lora\.start is 'a'; expected null with train: body"),
        ({**LEAST, "lora": {"dropout": 0.001}}, r"lora\.dropout is 0\.001; .* 1/256 to 255/256: dropout is drawn in"),
        ({**LEAST, "attention_dropout": 0.999}, r"attention_dropout is 0\.999; expected 0, or a rate from 1/256"),
        ({**LEAST, "optimizer": {"schedule": "step"}}, r"optimizer\.schedule is 'step'; one of constant, linear"),
        ({**LEAST, "optimizer": {"learning_rate": float("nan")}}, r"optimizer\.learning_rate is nan"),
        (
            {**LEAST, "optimizer": {"learning_rate": 2e4}},
            r"learning_rate is 20000\.0; expected above 0, up to 1: AdamW",
        ),
        ({**LEAST, "optimizer": {"betas": [0.9]}}, r"optimizer\.betas"),
        ({**LEAST, "temperature": 0}, "temperature is 0"),
        ({**LEAST, "attention_dropout": 1.0}, "attention_dropout is 1"),
        ({**LEAST, "batch_size": 0}, "batch_size is 0"),
        (
            {**LEAST, "loop": {"evaluate_every": 5}},
            r"loop\.evaluate_every is 5; expected 0 where no file is named: sts=",
        ),
        ({**LEAST, "sts": "dev.tsv"}, r"sts is 'dev.tsv'; expected null, or loop\.evaluate_every above 0"),
        ({**LEAST, "loss": "cosent", "margin": 0.1}, "margin is 0.1; expected null with loss: cosent"),
        ({**LEAST, "dtype": "float16"}, "dtype is 'float16'; one of float32, bfloat16"),
        ({**LEAST, "loss": "cosent", "prefixes": [8]}, r"prefixes is \[8\]; expected empty with loss: cosent"),
        ({**LEAST, "view": "crop", "pairs": ["a.jsonl"]}, "view is 'crop'; expected dropout with pairs"),
        ({**LEAST, "texts": {"a": 1}}, "texts is {'a': 1}; expected a list"),
        ({**LEAST, "texts": [1]}, r"texts\[0\] is 1; expected str"),
    ],
    ids=str,
)
def test_refuses_by_key(values, named):
    with pytest.raises(ConfigError, match=named):
        build(ContrastiveConfig, values, "run.yaml")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("lora.r=500", r"^override lora\.r=500: lora\.r is 500; expected 1 to 128"),
        ("lora={r: 500}", r"^override lora=\{r: 500\}: lora\.r is 500"),
        ("lora.rank=4", r"^override lora\.rank=4: lora\.rank is unknown"),
        ("texts=[1]", r"^override texts=\[1\]: texts\[0\] is 1; expected str"),
        ("optimizer=adam", "^override optimizer=adam: optimizer is 'adam'; expected keys"),
        ("texts=a.txt", r"^run\.yaml: max_length is 1; expected 2 or more"),
        ("lora={r: 1, r: 2}", "^override lora: r is there twice"),
        ("=5", "'=5' is no override"),
        (" =5", "is no override"),
    ],
    ids=str,
)
def test_an_override_is_named_for_what_it_says(override, named, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: base\noutput: out\nmax_length: 1\n")
    with pytest.raises(ConfigError, match=named):
        read_config(MntpConfig, path, [override])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Given a query, ", "Given a query, "),
        ("Query #1: x", "Query #1: x"),
        ("Say: ", "Say: "),
        ("yes", "yes"),
        ("2024-01-01", "2024-01-01"),
        ("'Query: '", "Query: "),
        ("null", None),
        ("", None),
    ],
)
def test_a_text_is_taken_as_it_stands(text, value, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(LEAST))
    read = read_config(ContrastiveConfig, tmp_path / "run.json", [f"instruction={text}", "output=123"])
    assert read.instruction == value and read.output == "123"


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("run.toml", "", "give a .yaml or .json file"),
        ("run.yaml", "model: a\nlora:\n  r: 1\n  alpha: 2\n  r: 3\n", r"run\.yaml: r is there twice: keep one"),
        ("run.yaml", "texts: [{a: 1, a: 2}]", "a is there twice"),
        ("run.json", '{"model": "a", "model": "b"}', r"run\.json: model is there twice"),
        ("run.yaml", "a: [", "not valid YAML"),
        ("run.yaml", "- 1", "expected keys and values"),
        ("run.json", "{", "not valid JSON"),
        ("run.yaml", "model: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_refuses_files(name, text, named, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=named):
        read_config(MntpConfig, tmp_path / name)
    with pytest.raises(ConfigError, match="no such file"):
        read_config(MntpConfig, tmp_path / "other.yaml")


def test_refuses_overrides_that_are_none(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(LEAST))
    with pytest.raises(ConfigError, match="write key=value"):
        read_config(MntpConfig, tmp_path / "run.json", ["lora.r"])
    with pytest.raises(ConfigError, match="model holds 'base', no keys"):
        read_config(MntpConfig, tmp_path / "run.json", ["model.r=3"])


# Settings as the reference's files for its three scripts state them.
MNTP = {
    "model_name_or_path": "owner/llama", "dataset_name": "wikitext", "dataset_config_name": "wikitext-103-raw-v1",
    "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32, "gradient_accumulation_steps": 1,
    "do_train": True, "do_eval": True, "max_seq_length": 512, "mask_token_type": "blank",
    "data_collator_type": "default", "mlm_probability": 0.2, "overwrite_output_dir": True, "output_dir": "output/mntp",
    "evaluation_strategy": "steps", "eval_steps": 100, "save_steps": 200, "stop_after_n_steps": 1000, "lora_r": 16,
    "gradient_checkpointing": True, "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2",
}  # fmt: skip
SIMCSE = {
    "model_name_or_path": "owner/llama", "peft_model_name_or_path": "owner/mntp", "simcse_dropout": 0.3,
    "bidirectional": True, "pooling_mode": "mean", "remove_unused_columns": False, "dataset_name": "Wiki1M",
    "dataset_file_path": "cache/wiki.txt", "learning_rate": 3e-5, "loss_scale": 20, "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1, "do_train": True, "max_seq_length": 128, "overwrite_output_dir": True,
    "output_dir": "output/simcse", "logging_steps": 50, "save_steps": 200, "save_only_model": True,
    "disable_tqdm": False,
    "stop_after_n_steps": 1000, "lora_r": 16, "gradient_checkpointing": True, "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2", "seed": 42,
}  # fmt: skip


def test_the_references_files_are_taken_as_they_are(tmp_path):
    (tmp_path / "mntp.json").write_text(json.dumps(MNTP))
    config = read_config(MntpConfig, tmp_path / "mntp.json", ["texts=[wiki.txt]"])
    assert (config.model, config.output, config.batch_size, config.max_length) == (
        "owner/llama",
        "output/mntp",
        32,
        512,
    )
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (16, 32, 0.05)
    assert (config.mask_probability, config.mask_token, config.masking) == (0.2, "_", "bert")
    assert config.llm2vec_compat and config.loop.recompute and config.loop.steps == 1000
    assert config.optimizer.learning_rate == 5e-5 and config.optimizer.clip == 1 and config.texts == ("wiki.txt",)
    all_mask = translate({**MNTP, "data_collator_type": "all_mask", "mlm_probability": 0.8}, "MntpConfig", "x.json")
    assert (all_mask["masking"], all_mask["mask_probability"]) == ("all", 0.8)

    (tmp_path / "simcse.json").write_text(json.dumps(SIMCSE))
    simcse = read_config(ContrastiveConfig, tmp_path / "simcse.json")
    assert simcse.adapters == ("owner/mntp",) and simcse.texts == ("cache/wiki.txt",) and not simcse.pairs
    assert (simcse.temperature, simcse.attention_dropout, simcse.pooling) == (0.05, 0.3, "mean")
    supervised = translate({**SIMCSE, "dataset_name": "E5", "warmup_steps": 300}, "ContrastiveConfig", "x.json")
    supervised.pop("temperature")
    assert supervised["pairs"] == ["cache/wiki.txt"] and supervised["e5_instructions"] and not simcse.e5_instructions
    assert supervised["optimizer"]["warmup_steps"] == 300
    (tmp_path / "short.json").write_text(json.dumps({**SIMCSE, "warmup_steps": 300, "stop_after_n_steps": 10}))
    assert read_config(ContrastiveConfig, tmp_path / "short.json").optimizer.decay_steps == 301


def test_what_the_references_files_leave_out_is_as_in_its_scripts(monkeypatch):
    least = {"model_name_or_path": "owner/llama"}
    mntp = translate(least, "MntpConfig", "x.json")
    assert (mntp["max_length"], mntp["loop"]["steps"], mntp["masking"]) == (1024, 10_000, "bert")
    simcse = translate({**least, "bidirectional": True, "dataset_name": "Wiki1M"}, "ContrastiveConfig", "x.json")
    assert (simcse["attention_dropout"], simcse["temperature"], simcse["max_length"]) == (0.1, 1 / 50, 512)
    supervised = translate({**least, "bidirectional": True, "dataset_name": "E5"}, "ContrastiveConfig", "x.json")
    assert supervised["attention_dropout"] == 0.0 and supervised["batch_size"] == 8
    with pytest.raises(ConfigError, match="bidirectional is false, or not there"):
        translate(least, "ContrastiveConfig", "x.json")
    with pytest.raises(ConfigError, match="data_collator_type is 'other'; known are default, all_mask"):
        translate({**MNTP, "data_collator_type": "other"}, "MntpConfig", "x.json")
    monkeypatch.setenv("WORLD_SIZE", "8")  # its sizes are a process's
    assert translate({**MNTP, "bf16": True}, "MntpConfig", "x.json")["batch_size"] == 256


def test_a_tilde_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = build(MntpConfig, {**LEAST, "output": "~/out", "sts": "~/dev.csv", "loop": {"evaluate_every": 1}})
    assert (config.output, config.sts) == (str(tmp_path / "out"), str(tmp_path / "dev.csv"))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"loss_scale": 0}, "loss_scale is 0; expected a positive number"),
        ({"loss_scale": "20"}, "loss_scale is '20'; expected a number"),
        ({"lora_r": None}, "lora_r is None; expected a whole number"),
        ({"stop_after_n_steps": "10"}, "stop_after_n_steps is '10'; expected a whole"),
        ({"pooling_mode": ["mean"]}, r"pooling_mode is \['mean'\]; expected a word"),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16'; training runs in"),
    ],
    ids=str,
)
def test_the_references_values_are_checked_by_their_own_names(values, named):
    with pytest.raises(ConfigError, match=f"^x.json: {named}"):
        translate({**SIMCSE, **values}, "ContrastiveConfig", "x.json")
    assert "dtype" not in translate({**SIMCSE, "torch_dtype": "auto"}, "ContrastiveConfig", "x.json")


def test_the_references_unknown_keys_are_refused():
    assert is_reference(MNTP) and not is_reference(LEAST)
    with pytest.raises(ConfigError, match="lora_bias is not known"):
        translate({**MNTP, "lora_bias": True}, "MntpConfig", "x.json")
    with pytest.raises(ConfigError, match="bidirectional is false"):
        translate({**SIMCSE, "bidirectional": False}, "ContrastiveConfig", "x.json")
    epochs = {key: value for key, value in MNTP.items() if key != "stop_after_n_steps"}
    with pytest.raises(ConfigError, match="num_train_epochs is 3: add stop_after_n_steps"):
        translate({**epochs, "num_train_epochs": 3}, "MntpConfig", "x.json")
    assert translate({**MNTP, "num_train_epochs": 3}, "MntpConfig", "x.json")["loop"]["steps"] == 1000
    words = {"model_name_or_path": "owner/llama", "peft_addr": "owner/mntp", "classifier_dropout": 0.1}
    with pytest.raises(ConfigError, match=r"^x.json: trains a classifier of words.*evaluate words, with --adapter"):
        translate(words, "MntpConfig", "x.json")
    with pytest.raises(ConfigError, match="no such objective"):
        translate(MNTP, "DistillConfig", "x.json")
    with pytest.raises(ConfigError, match="mask_token_type is 'eos'"):
        translate({**MNTP, "mask_token_type": "eos"}, "MntpConfig", "x.json")
