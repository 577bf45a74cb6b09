"""Low-rank parameters against PEFT: what is computed, what is written, what is read."""

import dataclasses
import json

import numpy as np
import peft
import pytest
import torch
import transformers
from family_models import models
from gguf_samples import write_quantised
from safetensors.torch import load_file, save_file
from tiny_models import PROJECTIONS, tiny_adapter, tiny_checkpoint, tiny_model
from training_runs import config_for, sentences, tiny_base, write_texts

from flashvec.runtime.batches import TokenRows
from flashvec.runtime.checkpoint.source import CheckpointError
from flashvec.runtime.decoder import Training
from flashvec.runtime.encoder import Encoder
from flashvec.training.adapter import read_adapter, write_adapter
from flashvec.training.average import average_adapters
from flashvec.training.config import LoraConfig, MntpConfig, build
from flashvec.training.encode import run_rows, token_rows
from flashvec.training.evaluate import embed_with
from flashvec.training.lora import PRODUCTS, Lora
from flashvec.training.model import load_model
from flashvec.training.run import run_training
from flashvec.training.settings import ConfigError

CASES = {
    "all": {"r": 4, "alpha": 8.0},
    "few targets": {"r": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "up_proj"]},
    "rslora": {"r": 8, "alpha": 3.0, "rslora": True},
}


def loaded(tmp_path, lora):
    tiny_checkpoint(tmp_path / "base", "llama", num_hidden_layers=2)
    write_texts(tmp_path / "texts.txt")
    values = {"model": str(tmp_path / "base"), "output": str(tmp_path / "out"), "lora": lora, "dtype": "float32"}
    return load_model(build(MntpConfig, values))


def fill(lora):
    """Random values in every target's A and B; B starts as zero."""
    generator = torch.Generator().manual_seed(3)
    for _, a, b in lora.matrices():
        a.copy_(torch.randn(a.shape, generator=generator) * 0.1)
        b.copy_(torch.randn(b.shape, generator=generator) * 0.1)


def hidden(model, ids):
    """Our final residual stream of one text, with a graph."""
    rows = TokenRows(np.array(ids, np.int32), np.array([len(ids)], np.int32), np.array([[0, len(ids)]], np.int64))
    (stream,), _ = run_rows(model, rows, [0], model.trainable.training())
    return (stream.hidden_TD + stream.delta_TD)[: len(ids)]  # the rest fills the rows up


@pytest.mark.parametrize("case", CASES)
def test_states_and_gradients_are_pefts(case, tmp_path):
    model = loaded(tmp_path, {**CASES[case], "dropout": 0.0})
    fill(model.trainable.lora)
    write_adapter(tmp_path / "adapter", model.trainable.lora, "base")
    base = transformers.AutoModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    base.config.is_causal = False
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    norm = base.norm
    captured = {}
    norm.register_forward_pre_hook(lambda module, args: captured.update(h=args[0]))
    ids = [5, 17, 300, 44, 9, 128, 77]
    theirs(input_ids=torch.tensor([ids]))
    ours = hidden(model, ids)
    scale = float(captured["h"].abs().max())
    torch.testing.assert_close(ours / scale, captured["h"][0] / scale, rtol=0, atol=1e-5)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)) / scale
    (ours * weights).sum().backward()
    (captured["h"][0] * weights).sum().backward()
    want = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): x.grad
        for name, x in theirs.named_parameters()
        if x.grad is not None
    }
    parts = dict(gradients(model.trainable.lora))
    assert parts.keys() == want.keys() and len(want) == 2 * 2 * len(CASES[case].get("targets", PROJECTIONS))
    largest = max(float(x.abs().max()) for x in want.values())
    for name, x in want.items():
        assert float((parts[name] - x).abs().max()) <= 1e-5 * largest, name


def gradients(lora):
    """By PEFT's names; of projections that are no target there must be none but zeros."""
    for index, layer in enumerate(lora.layers()):
        for product, names in PRODUCTS.items():
            if (pair := getattr(layer, product)) is None:
                continue
            for p, (name, b) in enumerate(zip(names, pair.b_NR.grad.split(lora.splits[product]), strict=True)):
                if pair.scales[p]:
                    yield f"layers.{index}.{name}.lora_A", pair.a_PRC.grad[p]
                    yield f"layers.{index}.{name}.lora_B", b
                else:
                    assert not pair.a_PRC.grad[p].any() and not b.any()


@pytest.mark.parametrize("wrapped", ["headless", "causal_lm"])
def test_what_is_written_peft_and_the_encoder_read(wrapped, tmp_path):
    model = loaded(tmp_path, {"r": 4, "alpha": 8.0})
    fill(model.trainable.lora)
    write_adapter(tmp_path / "adapter", model.trainable.lora, "base", wrapped)
    ids = [5, 17, 300, 44]
    with torch.no_grad():
        ours = hidden(model, ids)
    merged = Encoder.load(tmp_path / "base", adapters=tmp_path / "adapter", dtype="float32", attention="bidirectional")
    with torch.no_grad():
        model.decoder.layers = merged.decoder.layers
        model.trainable.training = Training
        torch.testing.assert_close(hidden(model, ids), ours, rtol=1e-4, atol=1e-4)
    cls = "LlamaModel" if wrapped == "headless" else "LlamaForCausalLM"
    theirs = peft.PeftModel.from_pretrained(
        getattr(transformers, cls).from_pretrained(tmp_path / "base"), str(tmp_path / "adapter")
    )
    got = {n.split(".layers.")[1].replace(".default", ""): x for n, x in theirs.named_parameters() if "lora_" in n}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(got) == len(stored) == 2 * 14
    for name, x in stored.items():
        assert torch.equal(got[name.split(".layers.")[1]], x) and x.any()


def test_a_run_leaves_no_file_that_its_owner_alone_can_read(tmp_path):
    run_training(config_for("mntp", tmp_path, loop={"steps": 1}))
    (tmp_path / "any").touch()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"adapter_model.safetensors", "parameters.safetensors"} <= {file.name for file in files}
    assert {file.stat().st_mode for file in files} == {(tmp_path / "any").stat().st_mode}


def test_half_the_bytes_where_asked_and_a_finished_run_is_only_saved_anew(tmp_path):
    config = config_for("contrastive", tmp_path, loop={"steps": 2}, lora={"dropout": 0.0})
    run_training(config)
    whole = load_file(tmp_path / "out" / "adapter_model.safetensors")
    log = (tmp_path / "out" / "log.jsonl").read_text()
    half_config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, saved_as="bfloat16"))
    run_training(half_config)
    half = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert half.keys() == whole.keys() and (tmp_path / "out" / "log.jsonl").read_text() == log
    assert all(torch.equal(half[name], x.bfloat16()) for name, x in whole.items())
    vectors = Encoder.load(tmp_path / "out", dtype="float32").embed(["one", "two willows in a meadow"])
    assert np.isfinite(vectors).all()


def test_reads_what_peft_wrote_and_goes_on_from_it(tmp_path):
    model = loaded(tmp_path, {"r": 4, "alpha": 8.0})
    tiny_adapter(tiny_model(None, num_hidden_layers=2), tmp_path / "theirs", r=4, lora_alpha=8)
    read_adapter(tmp_path / "theirs", model.trainable.lora)
    write_adapter(tmp_path / "ours", model.trainable.lora, "base")
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[name]) for name, x in theirs.items())


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"r": 8, "alpha": 8.0}, "r is 4; set lora.r to it"),
        ({"r": 4, "alpha": 9.0}, "lora_alpha is 8; set lora.alpha to it"),
        ({"r": 4, "alpha": 8.0, "targets": ["q_proj"]}, "fits nowhere"),
    ],
)
def test_refuses_to_go_on_from_another_adapter(config, named, tmp_path):
    tiny_adapter(tiny_model(None, num_hidden_layers=2), tmp_path / "theirs", r=4, lora_alpha=8)
    with pytest.raises(CheckpointError, match=named):
        loaded(tmp_path, {**config, "start": str(tmp_path / "theirs")})


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_refuses_to_go_on_from_numbers_that_are_none(part, tmp_path):
    tiny_adapter(tiny_model(None, num_hidden_layers=2), tmp_path / "theirs", r=4, lora_alpha=8)
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    next(x for name, x in sorted(tensors.items()) if part in name).view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"{part}.* holds a number that is not finite"):
        loaded(tmp_path, {"r": 4, "alpha": 8.0, "start": str(tmp_path / "theirs")})
    with pytest.raises(CheckpointError, match=f"{part}.* holds a number that is not finite"):
        average_adapters([tmp_path / "theirs"] * 2, tmp_path / "mean")


def test_chain_of_two_trained_folders(tmp_path, monkeypatch):
    """MNTP first, then contrastive on it: the second folder leads to the first, and that to the base."""
    for name in ("elsewhere/work", "elsewhere/base", "elsewhere/mntp"):  # what ../base is from another folder
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "work")
    run_training(config_for("mntp", tmp_path, output=str(tmp_path / "mntp"), loop={"steps": 2}))
    second = config_for("contrastive", tmp_path, model=str(tmp_path / "mntp"), output=str(tmp_path / "simcse"))
    run_training(second, until=None)
    config = json.loads((tmp_path / "simcse" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "../mntp"
    chained = Encoder.load(tmp_path / "simcse", dtype="float32")
    by_hand = Encoder.load(tmp_path / "base", adapters=(tmp_path / "mntp", tmp_path / "simcse"), dtype="float32")
    text = "a river of copper"
    assert np.array_equal(chained.embed(text), by_hand.embed(text))
    assert not np.array_equal(chained.embed(text), Encoder.load(tmp_path / "mntp", dtype="float32").embed(text))


def test_an_adapter_of_another_base_is_no_start_unless_both_are_said_to_be_one(tmp_path):
    config = config_for("contrastive", tmp_path)
    write_adapter(tmp_path / "theirs", load_model(config).trainable.lora, "owner/other")
    start = {"start": str(tmp_path / "theirs")}
    with pytest.raises(CheckpointError, match=r"theirs/adapter_config.json: .* is 'owner/other', .* base is 'base';"):
        load_model(config_for("contrastive", tmp_path, lora=start))
    load_model(config_for("contrastive", tmp_path, lora=start, base_name="another/other"))


def test_an_adapter_that_nothing_would_name_is_refused(tmp_path, caplog):
    """The new adapter names the last one below it alone."""
    lora = load_model(config_for("contrastive", tmp_path)).trainable.lora
    write_adapter(tmp_path / "first", lora, "../base")
    for stated, is_lost in (("../base", True), ("../first", False)):
        write_adapter(tmp_path / "second", lora, stated)
        config = config_for("contrastive", tmp_path, adapters=[str(tmp_path / "first"), str(tmp_path / "second")])
        if is_lost:
            with pytest.raises(
                ConfigError, match=r"second is of base '\.\./base', not of .*first, which would be lost"
            ):
                load_model(config)
        else:
            load_model(config)
    run_training(config_for("mntp", tmp_path, output=str(tmp_path / "below"), loop={"steps": 1}))
    write_adapter(tmp_path / "second", lora, "../base")
    with pytest.raises(ConfigError, match=r"second is of base '\.\./base', not of .*below, which would be lost"):
        load_model(
            config_for("contrastive", tmp_path, model=str(tmp_path / "below"), adapters=[str(tmp_path / "second")])
        )
    write_adapter(tmp_path / "second", lora, "../below")
    with pytest.raises(ConfigError, match=r"second was trained on top of the adapter .*below, which would be left out"):
        load_model(config_for("contrastive", tmp_path, adapters=[str(tmp_path / "second")]))
    with caplog.at_level("WARNING", logger="flashvec"):
        Encoder.load(tmp_path / "base", adapters=[tmp_path / "below", tmp_path / "second"])
        Encoder.load(tmp_path / "below", adapters=[tmp_path / "second"])
    assert "which is not merged in below it" not in caplog.text
    Encoder.load(tmp_path / "base", adapters=[tmp_path / "second"])
    assert "second was trained on the adapter below, which is not merged in below it" in caplog.text
    write_adapter(tmp_path / "second", lora, "owner/other")
    with caplog.at_level("WARNING", logger="flashvec"):
        load_model(config_for("contrastive", tmp_path, adapters=[str(tmp_path / "second")]))
    assert "second was trained on 'owner/other': is " in caplog.text
    write_adapter(tmp_path / "tiny-mntp", lora, "../base")
    write_adapter(tmp_path / "tiny-mntp-unsup-simcse", lora, "../base")  # as LLM2Vec publishes them
    load_model(config_for("contrastive", tmp_path, adapters=[
        str(tmp_path / "tiny-mntp"), str(tmp_path / "tiny-mntp-unsup-simcse")
    ]))  # fmt: skip


@pytest.mark.parametrize("pooling", ["max", "mean_sqrt_len"])
def test_a_pooling_that_an_adapter_cannot_state_is_refused(pooling, tmp_path):
    with pytest.raises(ConfigError, match=f"pooling is {pooling}, which an adapter's folder cannot state; one of mean"):
        load_model(config_for("contrastive", tmp_path, pooling=pooling))


def test_heads_and_default_prompts_are_not_trained_past(tmp_path):
    encoder = Encoder.load(tiny_base(tmp_path / "base"), attention="bidirectional")
    encoder.spec = dataclasses.replace(encoder.spec, prompts={"q": "Query: "}, default_prompt_name="q")
    encoder.save(tmp_path / "prompted")
    with pytest.raises(ConfigError, match=r"prompted has a default prompt \(q\), which training leaves out"):
        load_model(config_for("contrastive", tmp_path, model=str(tmp_path / "prompted")))


def test_a_second_run_pools_as_the_first_was_told_to(tmp_path):
    first = config_for("contrastive", tmp_path, pooling="last", loop={"steps": 2}, output=str(tmp_path / "first"))
    run_training(first)
    second = config_for("contrastive", tmp_path, model=str(tmp_path / "first"), output=str(tmp_path / "second"))
    run_training(second)
    assert load_model(second).spec.pooling == Encoder.load(tmp_path / "second").spec.pooling == ("last",)
    above = dataclasses.replace(
        config_for("contrastive", tmp_path, loop={"steps": 2}, output=str(tmp_path / "above")),
        adapters=(str(tmp_path / "first"),),
    )
    run_training(above)
    assert load_model(above).spec.pooling == Encoder.load(tmp_path / "above").spec.pooling == ("last",)
    settings = tmp_path / "first" / "llm2vec_config.json"
    settings.write_text(settings.read_text().replace("last_token", "eos_token"))  # a textual end after every text
    ended = dataclasses.replace(second, output=str(tmp_path / "ended"))
    run_training(ended)
    spec = Encoder.load(tmp_path / "ended").spec
    assert load_model(ended).spec.text_suffix == spec.text_suffix == " </s>" and spec.pooling == ("last",)


def test_the_template_of_a_known_base_stands_around_texts_while_training(tmp_path):
    name = "mistralai/Mistral-7B-Instruct-v0.2"
    config = config_for("contrastive", tmp_path, base_name=name, loop={"steps": 2})
    stated = json.loads((tmp_path / "base" / "config.json").read_text()) | {"_name_or_path": "./checkpoint-500"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(stated))  # a name that says nothing stands before it
    run_training(config)
    template = load_model(config).spec.template
    loaded_back = Encoder.load(tmp_path / "base", adapters=(tmp_path / "out",))
    assert template == loaded_back.spec.template == "[INST] {text} [/INST]"


def test_trained_text_is_read_as_it_will_be_embedded(tmp_path):
    """Vectors while training, with the update beside the weights, are those of the saved folder."""
    config = config_for("contrastive", tmp_path, loop={"steps": 2}, dtype="float32")
    run_training(config)
    model = load_model(config)
    read_adapter(tmp_path / "out", model.trainable.lora)
    texts = ["one", "two willows in a meadow"]
    ours = torch.nn.functional.normalize(torch.from_numpy(embed_with(model)(texts)))
    want = torch.from_numpy(Encoder.load(tmp_path / "out", dtype="float32").embed(texts))
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)
    rows = token_rows(model, texts)
    assert (rows.spans[:, 0] == 1).all()  # without the first token, as LLM2Vec folders are pooled


def test_body_is_saved_as_an_encoder(tmp_path):
    config = config_for("contrastive", tmp_path, train="body", loop={"steps": 2}, optimizer={"learning_rate": 1e-3})
    run_training(config)
    trained, plain = Encoder.load(tmp_path / "out" / "encoder"), Encoder.load(tmp_path / "base")
    assert np.abs(trained.embed("ember") - plain.embed("ember")).max() > 1e-4
    assert torch.equal(trained.decoder.embedding_VD, plain.decoder.embedding_VD)


def test_an_adapter_over_a_gguf_file_is_opened_with_it_and_alone(tmp_path):
    """Its folder has no config.json: it must not be taken for a second adapter, on top of one that is not there."""
    base = write_quantised(tmp_path / "base.gguf")
    config = config_for("contrastive", tmp_path, model=str(base), loop={"steps": 2}, max_length=64)
    run_training(config)
    texts = ["one", "two willows in a meadow"]
    beside = Encoder.load(base, adapters=(tmp_path / "out",), dtype="float32").embed(texts)
    plain = Encoder.load(base, dtype="float32", attention="bidirectional").embed(texts)
    assert np.abs(beside - plain).max() > 1e-4
    np.testing.assert_array_equal(Encoder.load(tmp_path / "out", dtype="float32").embed(texts), beside)


def test_a_trained_body_forgets_ranges_of_the_untrained_one(tmp_path):
    tiny_base(tmp_path / "plain")
    encoder = Encoder.load(tmp_path / "plain", dtype="float32")
    encoder.calibrate(sentences(20))
    encoder.save(tmp_path / "base")
    run_training(config_for("contrastive", tmp_path, train="body", loop={"steps": 1}))
    trained = Encoder.load(tmp_path / "out" / "encoder")
    assert encoder.spec.int8_ranges is not None and trained.spec.int8_ranges is None


def test_same_seed_same_start():
    model = tiny_model(None)
    del model
    _, decoder = models("llama", "bidirectional")
    first, again, other = (Lora(decoder, LoraConfig(r=2), seed).parameters() for seed in (1, 1, 2))
    assert all(torch.equal(x, again[name]) for name, x in first.items())
    assert any(not torch.equal(x, other[name]) for name, x in first.items())
