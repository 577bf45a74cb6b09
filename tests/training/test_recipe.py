from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_checkpoint

from flashvec.runtime.encoder import Encoder
from flashvec.training import recipe
from flashvec.training.config import DistillConfig, read_config
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
    (tmp_path / "wiki.txt").write_text("".join(line.format(i) for i in range(40)))
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


def test_each_generation_goes_on_from_the_one_before(sources, monkeypatch, capsys):
    out, settings = sources / "out", sources / "settings"
    settings.mkdir()
    for number in (1, 2, 3):
        own = f"model: elsewhere\noutput: nowhere\nbatch_size: 8\nwhitening_texts: 8\nloop: {{steps: {2 * number}}}\n"
        own += f"teachers: [{', '.join(f'o/generation-{i}' for i in range(1, number))}]\n"
        (settings / f"generation-{number}.yaml").write_text(own)
    overrides = [f"model={sources / 'base'}", "lora.saved_as=bfloat16"]
    arguments = ["--wikipedia", str(sources / "wiki.txt"), "--wordnet", str(sources / "wordnet"), "--out", str(out)]
    monkeypatch.setattr(
        "sys.argv", ["recipe", *overrides, *arguments, "--settings", str(settings), "--seeds", "5", "25"]
    )
    recipe.main()
    printed = capsys.readouterr().out
    assert "generation-3, 3 of 3, seed 25" in printed and "the mean of 2 seeds" in printed
    names = ["examples.txt", "glosses.txt", "passages.txt", "sentences.txt"]
    assert sorted(file.name for file in (out / "texts").iterdir()) == names
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
    other = out / "seed-25" / "generation-3"
    last = [load_file(folder / "adapter_model.safetensors") for folder in (folders[2], other, out / "mean")]
    key = "base_model.model.layers.1.mlp.down_proj.lora_{}.weight"
    products = [x[key.format("B")].float() @ x[key.format("A")].float() for x in last]
    updates = [2 * products[0], 2 * products[1], products[2]]  # alpha is twice the rank of a run, and the mean's rank
    parts = torch.linalg.svdvals((updates[0] + updates[1]) / 2)[:16].square()  # a run's rank
    assert (updates[0] - updates[1]).norm() > 1e-3  # seeds do differ
    assert float(updates[2].square().sum()) == pytest.approx(float(parts.sum()), rel=2e-2)
    assert (out / "mean" / "seen.npy").is_file()
    (settings / "generation-1.yaml").write_text("model: elsewhere\noutput: nowhere\nteachers: [o/generation-2]\n")
    monkeypatch.setattr("sys.argv", ["recipe", *overrides, *arguments, "--settings", str(settings)])
    with pytest.raises(
        SystemExit, match=r"generation-1\.yaml: teachers: generation-2 is no generation before this one"
    ):
        recipe.main()
    monkeypatch.setattr("sys.argv", ["recipe", *arguments, "--settings", str(sources / "none")])
    with pytest.raises(SystemExit, match=r"recipe: .*none: no generation-1\.yaml in it"):
        recipe.main()
