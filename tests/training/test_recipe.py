import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint

from flashvec.runtime.encoder import Encoder
from flashvec.training import recipe
from flashvec.training.config import ContrastiveConfig, DistillConfig, read_config
from flashvec.training.data import DataError

LICENCE = "  1 This software and database | is being provided\n"
NOUNS = LICENCE + (
    '00001740 03 n 01 entity 0 000 | that which is seen to be a thing; "it was full of rackets and balls"\n'
    '00001930 03 n 01 short 0 000 | too short; "not long"\n'
    "00002137 03 n 01 dog 0 000 | a common animal that has been kept by people for long\n"
    '00002138 03 n 01 cat 0 000 | an animal; "the cat slept all day long"; "it was full of rackets and balls"\n'
)


@pytest.fixture
def sources(tmp_path):
    """Wikipedia's and WordNet's files, and a tiny base model."""
    tiny_checkpoint(tmp_path / "base", "llama", num_hidden_layers=2)
    line = "The mill of village {0} was built of grey stone. It stands beside the road to village {0} still.\n"
    asked = "A fox lives in wood {0}. It hunts in the fields near wood {0}. Few people have seen the fox of wood {0}.\n"
    (tmp_path / "wiki.txt").write_text("".join(line.format(i) + asked.format(i) for i in range(40)))
    folder = tmp_path / "wordnet"
    folder.mkdir()
    (folder / "data.noun").write_text(NOUNS)
    for part, verb in (("verb", "walked"), ("adj", "looked"), ("adv", "talked")):
        entries = (
            f'0 0 v 0 | to have {verb} a long way in year {i}; "she {verb} all the way {i} times"\n' for i in range(40)
        )
        (folder / f"data.{part}").write_text(LICENCE + "".join(entries))
    return tmp_path


def test_wordnet_gives_whole_examples_and_definitions_once(sources):
    examples, glosses = recipe.wordnet_texts(sources / "wordnet")
    assert examples[:2] == ["it was full of rackets and balls", "the cat slept all day long"]
    assert glosses[:2] == [
        "that which is seen to be a thing",
        "a common animal that has been kept by people for long",
    ]
    assert len(examples) == 2 + 120 and len(glosses) == 2 + 120 and not any("database" in line for line in glosses)
    (sources / "wordnet" / "data.adv").unlink()
    with pytest.raises(DataError, match=r"data\.adv: no such file; .* wordnet-base"):
        recipe.wordnet_texts(sources / "wordnet")


def test_runs_keep_neighbours():
    lines = [str(i) for i in range(42)]
    drawn = [int(line) for line in recipe.drawn_runs(lines, 12, seed=3)]
    assert len(drawn) == 12 and drawn == sorted(drawn)
    assert all(np.diff(drawn[i : i + 4]).tolist() == [1, 1, 1] and drawn[i] % 4 == 0 for i in (0, 4, 8))


def write_settings(folder, *generations):
    folder.mkdir(exist_ok=True)
    for number, settings in enumerate(generations, 1):
        (folder / f"generation-{number}.yaml").write_text(settings)


def run_recipe(monkeypatch, sources, *arguments):
    given = [f"model={sources / 'base'}", "lora.saved_as=bfloat16", "--out", str(sources / "out")]
    given += ["--wikipedia", str(sources / "wiki.txt"), "--wordnet", str(sources / "wordnet")]
    monkeypatch.setattr("sys.argv", ["recipe", *given, "--settings", str(sources / "settings"), *arguments])
    recipe.main()


def product_of(folder):
    """One update, fp32."""
    tensors = load_file(folder / "adapter_model.safetensors")
    a, b = (
        next(x for name, x in tensors.items() if name.endswith(f"layers.1.mlp.down_proj.lora_{letter}.weight"))
        for letter in "AB"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    return b.float() @ a.float() * (config["lora_alpha"] / config["r"])


DISTILL = "model: elsewhere\noutput: nowhere\nbatch_size: 8\nwhitening_texts: 8\nloop: {steps: 2}\n"
SEARCH = "model: elsewhere\noutput: nowhere\nbatch_size: 8\npairs: [o/pairs.jsonl]\nloop: {steps: 2}\n"


def test_each_generation_goes_on_from_the_one_before(sources, monkeypatch, capsys):
    taught = [f"teachers: [{', '.join(f'o/generation-{i}' for i in range(1, number))}]\n" for number in (1, 2, 3)]
    write_settings(sources / "settings", *(DISTILL + line for line in taught))
    run_recipe(monkeypatch, sources, "--seeds", "5", "25")
    printed = capsys.readouterr().out
    assert "generation-3, 3 of 3, seed 25" in printed and "the mean of 2 adapters" in printed
    out = sources / "out"
    assert {file.name for file in (out / "texts").iterdir()} == {*recipe.TEXT_FILES, *recipe.PAIRS_FILES}
    folders = [out / "seed-5" / f"generation-{number}" for number in (1, 2, 3)]
    vectors = [
        Encoder.load(sources / "base", adapters=folder, dtype="float32").embed(["a mill", "a road"])
        for folder in folders
    ]
    assert np.isfinite(vectors).all() and all(np.abs(b - a).max() > 1e-4 for a, b in pairwise(vectors))
    seen = [set(np.load(folder / "seen.npy", allow_pickle=False).tolist()) for folder in folders]
    assert len(seen[0]) > 8 and all(a < b for a, b in pairwise(seen))
    kept = [read_config(DistillConfig, folder / "train.yaml") for folder in folders]
    assert [config.loop.seed for config in kept] == [5, 6, 7]
    assert [config.teachers for config in kept] == [(), (str(folders[0]),), (str(folders[0]), str(folders[1]))]
    assert [config.lora.start for config in kept] == [None, str(folders[0]), str(folders[1])]
    first, second, mean = map(product_of, (folders[2], out / "seed-25" / "generation-3", out / "mean"))
    parts = torch.linalg.svdvals((first + second) / 2)[:16].square()  # a run's rank
    assert (first - second).norm() > 1e-3  # seeds do differ
    assert float(mean.square().sum()) == pytest.approx(float(parts.sum()), rel=2e-2)
    assert (out / "mean" / "seen.npy").is_file()


def test_a_generation_can_learn_search_and_one_be_the_mean_of_earlier_ones(sources, monkeypatch):
    side = SEARCH + "lora: {start: o/generation-1}\n"
    write_settings(
        sources / "settings", DISTILL, SEARCH, side, "mean: [o/generation-1, o/generation-3, o/generation-3]"
    )
    run_recipe(monkeypatch, sources, "--seeds", "5")
    folders = [sources / "out" / "seed-5" / f"generation-{number}" for number in (1, 2, 3, 4)]
    kept = [read_config(ContrastiveConfig, folder / "train.yaml") for folder in folders[1:3]]
    assert [config.lora.start for config in kept] == [str(folders[0])] * 2
    assert [config.pairs for config in kept] == [(str(sources / "out" / "texts" / "pairs.jsonl"),)] * 2
    first, _, third, mean = map(product_of, folders)
    assert (third - first).norm() > 1e-3
    assert torch.linalg.svdvals(mean - (first + 2 * third) / 3).max() < 0.1 * torch.linalg.svdvals(third - first).max()
    before = np.load(folders[3] / "seen.npy", allow_pickle=False)
    run_recipe(monkeypatch, sources, "--seeds", "5")  # nothing left to train; the mean is made anew
    assert torch.equal(product_of(folders[3]), mean)
    assert np.array_equal(np.load(folders[3] / "seen.npy", allow_pickle=False), before)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (
            [DISTILL + "teachers: [o/generation-2]"],
            r"generation-1\.yaml: teachers: generation-2 is no gen",
        ),
        ([DISTILL + "lora: {start: o/other}"], r"generation-1\.yaml: lora\.start: other is no generation before this"),
        (
            [DISTILL, "mean: [o/generation-1]"],
            r"generation-2\.yaml: mean: names 1 generation: a mean is of two or more",
        ),
        (
            [DISTILL, "mean: [o/generation-2, o/generation-1]"],
            r"generation-2\.yaml: mean: generation-2 is no generation before this",
        ),
        (
            [DISTILL, SEARCH.replace("pairs.j", "other.j")],
            r"generation-2\.yaml: pairs: other\.jsonl is not made; known are",
        ),
        ([], r"recipe: .*settings: no generation-1\.yaml in it"),
    ],
)
def test_settings_that_name_what_is_not_there_are_refused(sources, monkeypatch, settings, named):
    write_settings(sources / "settings", *settings)
    with pytest.raises(SystemExit, match=named):
        run_recipe(monkeypatch, sources)
