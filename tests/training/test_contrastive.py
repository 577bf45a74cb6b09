import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from training_runs import config_for, write_pairs, write_texts

from flashvec.runtime.batches import TokenRows
from flashvec.training.contrastive import Contrastive, cosent, crop, joined
from flashvec.training.data import DataError
from flashvec.training.distributed import World
from flashvec.training.encode import text_rows, token_rows
from flashvec.training.model import load_model
from flashvec.training.overlap import overlap_loss
from flashvec.training.run import run_training
from flashvec.training.settings import ConfigError


def objective_for(tmp_path, **values):
    config = config_for("contrastive", tmp_path, dtype="float32", **values)
    return Contrastive(load_model(config), config, World())


def vectors_for(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(columns.rows.lengths), 32, generator=generator, requires_grad=True)


def test_loss_is_cross_entropy_of_cosines_over_positives_and_all_negatives(tmp_path):
    objective = objective_for(tmp_path, pairs=[str(write_pairs(tmp_path / "p.jsonl", negatives=3))], temperature=0.2)
    columns = objective.batch(0)
    n, vectors = columns.num_queries, vectors_for(columns)
    assert len(vectors) > 2 * n  # ragged hard negatives
    unit = torch.nn.functional.normalize(vectors, dim=1)
    want = torch.nn.functional.cross_entropy(unit[:n] @ unit[n:].T / 0.2, torch.arange(n))
    torch.testing.assert_close(objective.loss(vectors, columns), want, rtol=1e-5, atol=1e-6)


def test_several_depths_are_taught_each_as_it_were_alone(tmp_path):
    pairs = [str(write_pairs(tmp_path / "p.jsonl"))]
    objective = objective_for(tmp_path, pairs=pairs, depths=[1, 2])
    columns = objective.batch(0)
    parts = [vectors_for(columns, seed) for seed in (0, 1)]
    alone = objective_for(tmp_path, pairs=pairs)
    want = sum(alone.loss(part, columns) for part in parts) / 2
    torch.testing.assert_close(objective.loss(torch.cat(parts, 1), columns), want)
    objective.step(0)
    assert all(x.grad is not None for x in objective.model.trainable.parameters().values())


def test_shared_words_teach_their_share_of_the_loss_at_every_size(tmp_path):
    pairs = [str(write_pairs(tmp_path / "p.jsonl", negatives=2))]
    objective = objective_for(tmp_path, pairs=pairs, words=0.25, prefixes=[8, 32])
    columns = objective.batch(0)
    vectors = vectors_for(columns)
    alone = objective_for(tmp_path, pairs=pairs, prefixes=[8, 32]).loss(vectors, columns._replace(overlap=None))
    assert columns.overlap.shape == (len(vectors), len(vectors)) and columns.overlap.any()
    overlap = torch.from_numpy(columns.overlap)
    shared = sum(overlap_loss(vectors[:, :size], overlap, objective.config.temperature) for size in (8, 32)) / 2
    torch.testing.assert_close(objective.loss(vectors, columns), 0.75 * alone + 0.25 * shared)
    assert objective.step(0)["loss"] > 0


def test_layers_after_the_last_depth_do_not_learn(tmp_path):
    objective = objective_for(tmp_path, pairs=[str(write_pairs(tmp_path / "p.jsonl"))], depths=[1])
    objective.step(0)
    trained = objective.model.trainable.parameters()
    assert trained and all(name.startswith("layers.0.") and x.grad is not None for name, x in trained.items())


@pytest.mark.parametrize(
    ("depths", "named"), [([1, 3], "depths are .1, 3., the model has 2 layers"), ([2, 1], "expected rising numbers")]
)
def test_depths_that_a_model_cannot_have_are_refused(tmp_path, depths, named):
    with pytest.raises(ConfigError, match=named):
        objective_for(tmp_path, pairs=[str(write_pairs(tmp_path / "p.jsonl"))], depths=depths)


def test_pairs_that_follow_each_other_meet_where_neighbours_says_so(tmp_path):
    files = [str(write_pairs(tmp_path / f"{name}.jsonl", count=9)) for name in "pq"]
    objective = objective_for(tmp_path, pairs=files, batch_size=8, neighbours=4)
    for step in range(6):
        rows = objective.batches.rows(step)
        first = 9 * (rows[0] // 9)  # of the batch's file
        runs = [set(range(first + start, first + min(start + 4, 9))) for start in (0, 4, 8)]
        assert sum(run <= set(rows.tolist()) for run in runs) == 2 and len(set(rows.tolist())) == 8


def test_copies_of_a_positive_are_left_out(tmp_path):
    objective = objective_for(tmp_path, pairs=[str(write_pairs(tmp_path / "p.jsonl"))])
    columns = objective.batch(0)
    n, vectors = columns.num_queries, vectors_for(columns)
    ids = columns.ids.copy()
    ids[2 * n] = ids[n]  # the first negative is a copy of the first positive
    without = objective.loss(vectors, columns._replace(ids=ids))
    unit = torch.nn.functional.normalize(vectors, dim=1)
    scores = unit[:n] @ unit[n:].T / 0.05
    scores[0, n] = float("-inf")
    torch.testing.assert_close(
        without, torch.nn.functional.cross_entropy(scores, torch.arange(n)), rtol=1e-5, atol=1e-6
    )


def test_matryoshka_is_the_mean_over_prefixes(tmp_path):
    pairs = {"pairs": [str(write_pairs(tmp_path / "p.jsonl"))]}
    objective = objective_for(tmp_path, prefixes=[8, 32], **pairs)
    columns = objective.batch(0)
    vectors = vectors_for(columns)
    whole = objective_for(tmp_path, **pairs)
    parts = [whole.loss(vectors[:, :size].contiguous(), columns) for size in (8, 32)]
    torch.testing.assert_close(objective.loss(vectors, columns), sum(parts) / 2, rtol=1e-5, atol=1e-6)


def test_cosent_counts_pairs_in_the_wrong_order():
    left = torch.randn(5, 8, requires_grad=True)
    right, scores = torch.randn(5, 8), np.array([0.0, 3.0, 1.0, 3.0, 2.0])
    cosines = torch.nn.functional.cosine_similarity(left, right) / 0.05
    total = torch.zeros(())
    for i in range(5):
        for j in range(5):
            if scores[i] > scores[j]:
                total = total + torch.exp((cosines[j] - cosines[i]).double())
    torch.testing.assert_close(cosent(left, right, scores, 0.05), torch.log1p(total).float(), rtol=1e-5, atol=1e-5)
    assert float(cosent(left.detach(), right, np.zeros(5), 0.05)) == 0  # nothing is to be ordered


def test_scored_pairs_train(tmp_path):
    scored = str(write_pairs(tmp_path / "p.jsonl", scored=True, negatives=0))
    objective = objective_for(tmp_path, pairs=[scored], loss="cosent")
    assert objective.step(0)["loss"] > 0
    assert any(x.grad.any() for x in objective.model.trainable.parameters().values())


def test_a_batch_of_one_score_has_nothing_to_rank_and_the_run_goes_on(tmp_path):
    """But not where every batch is so."""
    rows = [{"query": f"stone {i}", "positive": f"river {i}", "score": int(i > 20)} for i in range(24)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop = {"steps": 4, "seed": 3}
    config = config_for("contrastive", tmp_path, pairs=[str(path)], loss="cosent", batch_size=4, loop=loop)
    objective = Contrastive(load_model(config), config, World())
    alike = [len(set(objective.batch(step).scores)) == 1 for step in range(4)]
    assert alike[0] and not all(alike)
    run_training(config)
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] == 0 for line in log] == alike
    path.write_text("".join(json.dumps(row | {"score": 1}) + "\n" for row in rows))
    with pytest.raises(DataError, match="all scores of a file are alike"):
        Contrastive(objective.model, config, World())


def test_instructions_of_the_references_data_sets_go_by_their_files(tmp_path, caplog):
    (tmp_path / "echo").mkdir()
    for name in ("quora_duplicates", "own"):
        write_pairs(tmp_path / "echo" / f"{name}.jsonl", count=8)
    values = {"pairs": [str(tmp_path / "echo")], "max_length": 80}
    known = objective_for(tmp_path, e5_instructions=True, **values)
    heads = {(pair.source, pair.instruction) for pair in known.pairs}
    assert (1, "Find questions that have the same meaning as the input question; ") in heads and (0, None) in heads
    assert len(heads) == 3 and {pair.instruction for pair in objective_for(tmp_path, **values).pairs} == {None}
    assert "e5_instructions has none for own.jsonl: known by their names are allnli" in caplog.text
    with pytest.raises(ConfigError, match=r"e5_instructions has none for own\.jsonl"):
        objective_for(tmp_path, e5_instructions=True, pairs=[str(tmp_path / "echo" / "own.jsonl")])


def test_crops_are_runs_of_the_text_and_keep_what_stands_around():
    ids = np.arange(100, 120, dtype=np.int32)
    rows = TokenRows(ids, np.array([12, 8], np.int32), np.array([[1, 12], [0, 8]], np.int64))
    own = np.array([[1, 12], [0, 7]], np.int64)  # the second's last token is no text's, but pooled
    lengths = set()
    for seed in range(30):
        cut = crop(rows, own, np.random.default_rng(seed))
        first, second = cut.ids[: cut.lengths[0]], cut.ids[cut.lengths[0] :]
        assert first[0] == 100 and second[-1] == 119
        assert (np.diff(first[1:]) == 1).all() and (np.diff(second[:-1]) == 1).all()
        assert 6 <= cut.lengths[0] <= 12 and 5 <= cut.lengths[1] <= 8
        assert cut.spans.tolist() == [[1, cut.lengths[0]], [0, cut.lengths[1]]]
        lengths.add(int(cut.lengths[0]))
    assert len(lengths) > 4
    both = joined(rows, cut)
    assert np.array_equal(both.ids, np.concatenate([rows.ids, cut.ids])) and len(both.spans) == 4


def test_a_crop_is_pooled_from_its_first_token():
    """Also where the whole text was pooled from a later one: a prompt that is counted alone may end within the text."""
    rows = TokenRows(np.arange(12, dtype=np.int32), np.array([12], np.int32), np.array([[4, 12]], np.int64))
    cut = crop(rows, np.array([[1, 12]], np.int64), np.random.default_rng(0))
    assert cut.spans.tolist() == [[1, cut.lengths[0]]]


@pytest.mark.parametrize("instruction", [None, "Tell: "])
def test_crops_leave_template_and_special_tokens(instruction, tmp_path):
    objective = objective_for(tmp_path, view="crop", attention_dropout=0.0, lora={"dropout": 0.0}, max_length=64)
    objective.model.spec = replace(objective.model.spec, template="[INST] {text} [/INST]", span="template")
    asked = None if instruction is None else [instruction]
    rows, own = text_rows(objective.model, ["the river froze over in the winter"], asked)
    for seed in range(9):
        cut = crop(rows, own, np.random.default_rng(seed))
        after = len(rows.ids) - own[0, 1]
        assert after > 1 and np.array_equal(cut.ids[-after:], rows.ids[own[0, 1] :])
        assert np.array_equal(cut.ids[: own[0, 0]], rows.ids[: own[0, 0]])
        assert cut.spans.tolist() == [[own[0, 0], len(cut.ids)]]  # from the text's first token to the end, as whole
    empty, none = text_rows(objective.model, [""], asked)
    assert np.array_equal(crop(empty, none, np.random.default_rng(0)).ids, empty.ids)


def test_crop_views_of_a_text_differ(tmp_path):
    objective = objective_for(tmp_path, view="crop", attention_dropout=0.0, lora={"dropout": 0.0})
    columns = objective.batch(0)
    n = columns.num_queries
    assert (columns.rows.lengths[:n] != columns.rows.lengths[n:]).any()
    assert objective.step(0)["loss"] > 0


def test_instructions_stand_before_queries_alone_and_are_not_pooled(tmp_path):
    pairs = str(write_pairs(tmp_path / "p.jsonl"))
    plain = objective_for(tmp_path, pairs=[pairs], max_length=60).batch(0)
    asked = objective_for(tmp_path, pairs=[pairs], max_length=60, instruction="Find the same: ").batch(0)
    n = plain.num_queries
    assert np.array_equal(plain.rows.lengths[n:], asked.rows.lengths[n:])
    assert (asked.rows.lengths[:n] > plain.rows.lengths[:n]).all()
    assert (asked.rows.spans[:n, 0] > 1).all() and (asked.rows.spans[n:, 0] == 1).all()


def test_both_texts_of_a_graded_pair_are_read_under_the_instruction(tmp_path):
    pairs = str(write_pairs(tmp_path / "p.jsonl", negatives=0, scored=True))
    graded = {"pairs": [pairs], "loss": "cosent", "max_length": 60}
    plain = objective_for(tmp_path, **graded).batch(0)
    asked = objective_for(tmp_path, **graded, instruction="Find the same: ").batch(0)
    assert (asked.rows.lengths > plain.rows.lengths).all() and (asked.rows.spans[:, 0] > 1).all()


def test_an_instruction_that_leaves_no_room_is_refused_before_the_first_step(tmp_path):
    pairs = write_pairs(tmp_path / "p.jsonl", count=9)
    lines = pairs.read_text().splitlines()
    lines[6] = json.dumps({**json.loads(lines[6]), "instruction": "far too long for the room that there is " * 3})
    pairs.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl line 7: what stands around a text has \d+ tokens, max_length is 24"):
        objective_for(tmp_path, pairs=[str(pairs)])
    with pytest.raises(DataError, match=r"^instruction: what stands around a text has \d+ tokens, max_length is 8"):
        objective_for(tmp_path, max_length=8, instruction="a very long instruction that takes all of the room: ")


def test_a_text_of_which_nothing_is_left_names_its_line(tmp_path):
    objective = objective_for(tmp_path, max_length=24)
    around = objective.model.tokenizer.count(["q: :z"], special=True)[0]
    objective.model.spec = replace(objective.model.spec, max_length=int(around) + 1)
    with pytest.raises(DataError, match=r"b\.jsonl line 2: max_length=\d+ leaves nothing"):  # a snowman is three tokens
        token_rows(objective.model, ["\N{SNOWMAN}" * 9], ["q: {text}:z"], ["b.jsonl line 2"])


def test_files_of_views_may_be_smaller_than_a_batch(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"stone {i}\n" for i in range(14)))
    (tmp_path / "b.txt").write_text("".join(f"river {i}\n" for i in range(2)))
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    objective = objective_for(tmp_path, texts=files)
    assert {text.split()[0] for step in range(2) for text in objective.seen(step)} == {"stone", "river"}
    with pytest.raises(DataError, match=r"batch_size is 30, and texts does not hold .* \(16 rows\)"):
        objective_for(tmp_path, texts=files, batch_size=30)


def test_texts_whose_words_were_counted_were_seen(tmp_path):
    pairs = write_pairs(tmp_path / "p.jsonl")
    positives = {json.loads(line)["positive"] for line in pairs.read_text().splitlines()}
    for words in (0.0, 0.5):
        objective = objective_for(tmp_path, pairs=[str(pairs)], words=words)
        assert (positives <= set(objective.seen(0))) == bool(words) and not positives <= set(objective.seen(1))


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"texts": []}, ConfigError, "give either texts"),
        ({"batch_size": 50}, DataError, "batch_size is 50, and .* does not hold as many"),
        ({"attention_dropout": 0.0, "lora": {"dropout": 0.0}}, ConfigError, "nothing is dropped"),
        ({"loss": "cosent"}, ConfigError, "scores belong to cosent"),
        ({"words": 1.5}, ConfigError, "words is 1.5; expected 0 to 1, and 0 with loss: cosent"),
        ({"words": 0.5, "loss": "cosent"}, ConfigError, "words is 0.5; expected 0 to 1, and 0 with loss: cosent"),
        ({"prefixes": [16, 8]}, ConfigError, r"prefixes is \[16, 8\]; expected rising numbers from 2 on"),
        ({"prefixes": [1, 8]}, ConfigError, "of one dimension a unit vector keeps the sign alone"),
        ({"margin": -0.1}, ConfigError, "margin is -0.1; expected 0 or more, or null"),
        ({"prefixes": [8, 64]}, ConfigError, "prefixes end at 64, vectors have 32"),
        ({"batch_size": 1}, ConfigError, "batch_size is 1: a text is told from the others of its batch"),
    ],
    ids=str,
)
def test_refuses(values, error, named, tmp_path):
    write_texts(tmp_path / "texts.txt")
    with pytest.raises(error, match=named):
        objective_for(tmp_path, **values).step(0)
