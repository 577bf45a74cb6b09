"""What a run comes from: whatever it reads is part of what it is, and what that had seen of what it has."""

import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from gguf_samples import write_quantised
from tiny_models import tiny_adapter
from training_runs import config_for, tiny_base

from flashvec.training import origin
from flashvec.training.checkpoint import ResumeError
from flashvec.training.loop import finished
from flashvec.training.origin import difference, earlier_seen, fingerprint
from flashvec.training.run import run_training
from flashvec.training.settings import to_yaml


def adapter_over(base, folder, seed=0):
    """A PEFT adapter of random numbers that names its base."""
    torch.manual_seed(seed)
    tiny_adapter(transformers.AutoModel.from_pretrained(base, dtype=torch.float32), folder)
    assert peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path == str(base)
    return folder


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("where", ["model", "adapters", "teachers", "below the model"])
def test_another_adapter_is_another_run(where, tmp_path):
    base = tiny_base(tmp_path / "base")
    folder = adapter_over(base, tmp_path / "first")
    own = {"model": str(folder)} if "model" in where else {where: [str(folder)]}
    config = config_for("distill", tmp_path, **own)
    before = fingerprint(config)
    shutil.copytree(base, tmp_path / "copy")  # another time of writing
    shutil.copytree(tmp_path / "copy", base, dirs_exist_ok=True)
    assert fingerprint(config) == before
    changed = base / "model.safetensors" if where == "below the model" else folder / "adapter_model.safetensors"
    flip(changed, -1)
    assert fingerprint(config) != before


def test_another_gguf_file_is_another_run(tmp_path):
    file = write_quantised(tmp_path / "base.GGUF")
    config = config_for("contrastive", tmp_path, model=str(file))
    before = fingerprint(config)
    flip(file, -1)
    assert fingerprint(config) != before


def test_a_run_from_before_a_setting_was_there_goes_on(tmp_path, monkeypatch):
    """MNTP had no `depths`: what is hashed of a run without them is what was hashed then."""
    configs = [config_for("mntp", tmp_path), config_for("mntp", tmp_path, depths=[1]), config_for("distill", tmp_path)]
    hashed, dumps = [], origin.json.dumps
    monkeypatch.setattr(origin.json, "dumps", lambda x, **how: hashed.append(x) or dumps(x, **how))
    for config in configs:
        fingerprint(config)
    assert ["depths" in settings for settings in hashed] == [False, True, True]


def test_a_setting_that_is_there_no_more_is_named(tmp_path):
    config = config_for("mntp", tmp_path, depths=[1])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.yaml").write_text(to_yaml(config))
    assert difference(config_for("mntp", tmp_path)) == "depths ((1,), now None)"


def test_large_weights_are_told_by_blocks_all_over_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(origin, "WHOLE_BYTES", 50_000)
    monkeypatch.setattr(origin, "HEAD_BYTES", 64)
    config = config_for("mntp", tmp_path)
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert size > 50_000
    known = {fingerprint(config)}
    for place in (9, size // 2, size - 1):
        flip(tmp_path / "base" / "model.safetensors", place)
        known.add(fingerprint(config))
    assert len(known) == 4


def test_a_run_over_an_adapter_that_was_trained_anew_is_not_taken_for_the_one_before(tmp_path):
    first = adapter_over(tiny_base(tmp_path / "base"), tmp_path / "first")
    np.save(first / "seen.npy", np.array([5, 7], np.int64))
    config = config_for("contrastive", tmp_path, adapters=[str(first)], loop={"steps": 2})
    last = run_training(config)
    assert finished(config) == last
    assert {5, 7} < set(np.load(tmp_path / "out" / "seen.npy").tolist())
    shutil.rmtree(first)
    adapter_over(tmp_path / "base", first, seed=1)
    assert finished(config) is None
    with pytest.raises(ResumeError, match="other contents of the files that it reads"):
        run_training(config)


def test_what_a_model_had_seen_is_found_beside_it_and_below_it(tmp_path):
    base = tiny_base(tmp_path / "base")
    places = {"start": 1, "mntp": 2, "body": 3, "teacher": 4}
    for name, value in places.items():
        adapter_over(base, tmp_path / name)
        np.save(tmp_path / name / "seen.npy", np.array([value], np.int64))
    start, teacher = str(tmp_path / "start"), str(tmp_path / "teacher")
    config = config_for("distill", tmp_path, model=str(tmp_path / "mntp"), lora={"start": start}, teachers=[teacher])
    assert earlier_seen(config) == {1, 2, 4}
    shutil.copytree(base, tmp_path / "body" / "encoder")
    assert earlier_seen(config_for("mntp", tmp_path, model=str(tmp_path / "body" / "encoder"))) == {3}
    assert earlier_seen(config_for("mntp", tmp_path)) == set()


def test_a_dtype_that_is_not_set_is_that_of_the_device(tmp_path, monkeypatch):
    """A run that began where bf16 is computed does not go on in fp32 without a word."""
    named = {}
    for has_bf16 in (True, False):
        monkeypatch.setattr("flashvec.training.model.has_hardware_bf16", lambda device, answer=has_bf16: answer)
        named[has_bf16] = fingerprint(config_for("mntp", tmp_path, dtype=None))
    assert named[True] == fingerprint(config_for("mntp", tmp_path, dtype="bfloat16"))
    assert named[False] == fingerprint(config_for("mntp", tmp_path, dtype="float32")) != named[True]
