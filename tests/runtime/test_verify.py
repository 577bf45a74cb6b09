import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import TEXTS, tiny_checkpoint
from typer.testing import CliRunner

from flashvec import Encoder
from flashvec.runtime import verify
from flashvec.runtime.cli import app
from flashvec.runtime.decoder import Decoder
from flashvec.runtime.verify import read_texts, report_rows, verify_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_checkpoint(folder, "gemma2")
    return folder


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_passes_in_fp32(folder, attention):
    report = verify_model(folder, TEXTS, dtype="float32", attention=attention)
    assert not report["failures"] and report["rows"]["flashvec"]["max_difference"] <= 1e-5
    assert report["rows"]["flashvec"]["top10_overlap"] == 1.0
    assert json.loads(json.dumps(report)) == report


STATED = {
    "says bidirectional": ("llama", {"is_causal": False}, "bidirectional"),
    "says causal": ("llama", {"is_causal": True}, "causal"),
    "windows": ("gemma3", {"is_causal": False}, "bidirectional"),
    "halved windows": ("gemma3", {"use_bidirectional_attention": True}, "bidirectional"),
    "by its name": ("llama", {"model_type": "llama_bidirec"}, "bidirectional"),
}


@pytest.mark.parametrize("attention", ["bidirectional", "causal", None])
@pytest.mark.parametrize("stated", STATED)
def test_runs_the_chosen_direction_on_both_sides(stated, attention, tmp_path):
    family, keys, own = STATED[stated]
    tiny_checkpoint(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text()) | keys
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify_model(tmp_path, TEXTS, dtype="float32", attention=attention)
    assert not report["failures"] and report["attention"] == (attention or own)


@pytest.mark.parametrize("normalize", [True, False])
def test_compares_like_with_like_whatever_the_folders_rules(prompted_folder, tmp_path, normalize):
    enc = Encoder.load(prompted_folder, dtype="float32")
    enc.spec = replace(enc.spec, default_prompt_name="query", truncate_dim=8, normalize=normalize)
    enc.save(tmp_path / "own")
    assert not verify_model(tmp_path / "own", TEXTS, dtype="float32")["failures"]
    shutil.copytree(tmp_path / "own", tmp_path / "theirs")
    (tmp_path / "theirs" / "flashvec.json").unlink()
    assert not verify_model(tmp_path / "theirs", TEXTS, dtype="float32")["failures"]


def test_compares_bf16_with_hugging_faces_bf16(folder):
    report = verify_model(folder, TEXTS, dtype="bfloat16")
    assert set(report["rows"]) == {"flashvec", "hugging face"}
    table = report_rows(report)
    assert len(table) == 3 and all(len(row) == len(table[0]) for row in table)


def test_fails_when_the_forward_is_wrong(folder, monkeypatch, tmp_path):
    run = Decoder.run

    def wrong(self, ids, schedule, plan, causal, **selected):
        return run(self, ids, schedule, plan, True, **selected)

    monkeypatch.setattr(Decoder, "run", wrong)
    report = verify_model(folder, TEXTS, dtype="float32")
    assert "largest difference" in report["failures"][0]
    assert verify_model(folder, TEXTS, dtype="bfloat16")["failures"]
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text in TEXTS if text.strip()))
    done = CliRunner().invoke(app, ["verify", str(folder), str(texts), "--dtype", "float32"])
    assert done.exit_code == 1 and "largest difference" in done.output and "passed" not in done.output


def test_counts_what_is_not_finite():
    spec = type("Spec", (), {"attention": "causal", "pooling": ("mean",)})()
    x = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    broken = x.clone()
    broken[0, 0] = torch.nan
    report = verify._report(broken, x, x, "float32", spec)
    assert report["rows"]["flashvec"]["non_finite"] == 1 and len(report["failures"]) == 2


def test_reads_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n two \nthree\n")
    assert read_texts(path, 2) == ["one", "two"]
    path.write_text("one\n")
    with pytest.raises(ValueError, match="has 1 texts"):
        read_texts(path, 10)
    path.write_text("one\ntwo\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"texts\.txt is UTF-16; convert it"):
        read_texts(path, 10)
    path.write_text("one\ntwo\n", encoding="utf-8-sig")
    assert read_texts(path, 10) == ["one", "two"]
    assert len(read_texts(None, 50)) == 50
