import itertools

import numpy as np
import pytest
import torch
import transformers
from tiny_models import tiny_checkpoint, tiny_tokenizer
from training_runs import config_for, sentences

from flashvec.runtime.checkpoint.export import convert
from flashvec.runtime.checkpoint.open import Overrides
from flashvec.runtime.tokenize import Tokenizer
from flashvec.training.data import DataError, rows_of_step
from flashvec.training.distributed import World
from flashvec.training.mntp import Blocks, Mntp, cut_blocks, mask_blocks, mask_token_id, maskable
from flashvec.training.model import load_model
from flashvec.training.settings import ConfigError

SETTINGS = {"probability": 0.3, "mask_id": 7, "vocab_size": 420, "special_ids": (1,), "all_mask": False}


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer(tmp_path)
    return Tokenizer.from_folder(tmp_path)


def objective_for(tmp_path, **values):
    config = config_for("mntp", tmp_path, dtype="float32", **values)
    return Mntp(load_model(config, wants_head=True), config, World())


def test_blocks_end_with_their_text(tokenizer):
    texts = sentences(9)
    blocks = cut_blocks(tokenizer, texts, 6, joined=False)
    lengths = tokenizer.encode(texts, 10_000).lengths
    assert max(blocks.spans[:, 1] - blocks.spans[:, 0]) == 6
    ends = set(np.cumsum(lengths))
    for (text, after), (start, stop) in zip(blocks.texts, blocks.spans, strict=True):
        assert after == text + 1
        assert sum(lengths[:text]) <= start < stop <= sum(lengths[: text + 1])
        assert stop - start == 6 or stop in ends


def test_joined_blocks_are_all_full_and_cross_texts(tokenizer):
    texts = sentences(9)
    blocks = cut_blocks(tokenizer, texts, 16, joined=True)
    assert ((blocks.spans[:, 1] - blocks.spans[:, 0]) == 16).all()
    assert blocks.spans[0].tolist() == [0, 16] and len(blocks.spans) == len(blocks.ids) // 16
    stops = np.cumsum(tokenizer.encode(texts, 10_000).lengths)
    for (first, after), (start, stop) in zip(blocks.texts, blocks.spans, strict=True):
        of_tokens = np.unique(np.searchsorted(stops, np.arange(start, stop), side="right"))  # the text of each token
        assert of_tokens.tolist() == list(range(first, after))
    assert (blocks.texts[:, 1] - blocks.texts[:, 0]).max() > 1
    with pytest.raises(DataError, match="no block of 4096 tokens"):
        cut_blocks(tokenizer, texts, 4096, joined=True)


def test_masks_spare_first_and_special_tokens_and_keep_their_shares(tokenizer):
    blocks = cut_blocks(tokenizer, sentences(3000), 64, joined=False)
    rows = np.arange(len(blocks.spans))
    masked = mask_blocks(blocks, rows, np.random.default_rng(0), **SETTINGS)
    firsts = masked.rows.starts[:-1]
    assert not np.isin(masked.positions, firsts).any()
    original = np.concatenate([blocks.ids[a:b] for a, b in blocks.spans])
    assert np.array_equal(original[masked.positions], masked.targets) and 1 not in masked.targets
    assert not np.delete(masked.rows.ids != original, masked.positions).any()
    count, now = len(masked.positions), masked.rows.ids[masked.positions]
    eligible = len(original) - len(np.union1d(firsts, np.flatnonzero(original == 1)))

    def within(share, expected, size):
        return abs(share - expected) < 5 * (expected * (1 - expected) / size) ** 0.5

    assert within(count / eligible, 0.3, eligible)
    assert within((now == masked.targets).mean(), 0.1 + 0.1 / 420, count)
    assert within((now == 7).mean(), 0.8, count)
    everything = mask_blocks(blocks, rows, np.random.default_rng(0), **{**SETTINGS, "all_mask": True})
    assert (everything.rows.ids[everything.positions] == 7).all()


def test_at_least_one_token_is_masked(tokenizer):
    blocks = cut_blocks(tokenizer, ["stone river"], 64, joined=False)
    few = {**SETTINGS, "probability": 1e-12}
    assert len(mask_blocks(blocks, np.array([0]), np.random.default_rng(0), **few).positions) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_loss_is_hugging_faces_on_the_same_labels(tied, tmp_path):
    """Its shift reads token i at i - 1; segment by segment, so that no state predicts another text's start."""
    from tiny_models import tiny_model

    (tmp_path / "base").mkdir()
    tiny_tokenizer(tmp_path / "base")
    tiny_model(tmp_path / "base", causal_lm=True, num_hidden_layers=2, tie_word_embeddings=tied)
    objective = objective_for(tmp_path, lora={"dropout": 0.0}, max_length=12)
    masked = objective.batch(1)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs.config.is_causal = False
    theirs.model.config.is_causal = False
    total, starts = 0.0, masked.rows.starts
    for start, stop in itertools.pairwise(starts):
        labels = torch.full((1, stop - start), -100)
        inside = (masked.positions >= start) & (masked.positions < stop)
        labels[0, masked.positions[inside] - start] = torch.from_numpy(masked.targets[inside])
        ids = torch.from_numpy(masked.rows.ids[start:stop].astype(np.int64))[None]
        if inside.any():
            with torch.no_grad():
                total += float(theirs(input_ids=ids, labels=labels).loss) * inside.sum()
    assert objective.step(1)["loss"] == pytest.approx(total / len(masked.positions), abs=1e-4)


def test_depths_are_models_cut_there_and_layers_behind_them_do_not_learn(tmp_path):
    values = {"lora": {"dropout": 0.0}, "max_length": 12}
    both, whole = (objective_for(tmp_path, **more, **values) for more in ({"depths": [1, 2]}, {}))
    cut = objective_for(tmp_path, **values)
    cut.model.decoder.layers = cut.model.decoder.layers[:1]
    first, last = cut.step(1)["loss"], whole.step(1)["loss"]
    assert both.step(1)["loss"] == pytest.approx((first + last) / 2, abs=1e-5) and abs(first - last) > 1e-3
    alone = objective_for(tmp_path, depths=[1], **values)
    assert alone.step(1)["loss"] == pytest.approx(first, abs=1e-5)
    trained = alone.model.trainable.parameters()
    assert trained and all(name.startswith("layers.0.") and x.grad is not None for name, x in trained.items())


def test_a_head_that_is_not_there_is_no_embedding(tmp_path):
    """An encoder is stored without its head: taken for the embeddings, an untied one would train towards noise."""
    from tiny_models import tiny_model

    for name, tied in (("untied", False), ("tied", True)):
        (tmp_path / name).mkdir()
        tiny_tokenizer(tmp_path / name)
        tiny_model(tmp_path / name, causal_lm=True, num_hidden_layers=2, tie_word_embeddings=tied)
        convert(tmp_path / name, tmp_path / f"{name} encoder", overrides=Overrides(attention="bidirectional"))
    with pytest.raises(ConfigError, match=r"untied encoder has no lm_head\.weight, .*; name the original model"):
        objective_for(tmp_path, model=str(tmp_path / "untied encoder"))
    objective = objective_for(tmp_path, model=str(tmp_path / "tied encoder"))
    assert torch.equal(objective.head_VD, objective.model.decoder.embedding_VD)


def test_the_heads_soft_cap_survives_conversion(tmp_path):
    tiny_checkpoint(tmp_path / "gemma", "gemma2", final_logit_softcapping=7.0)
    convert(tmp_path / "gemma", tmp_path / "encoder", overrides=Overrides(attention="bidirectional"))
    assert objective_for(tmp_path, model=str(tmp_path / "encoder")).model.head_softcap == 7.0


def test_head_is_trained_only_where_asked_for(tmp_path):
    frozen = objective_for(tmp_path)
    frozen.step(0)
    assert frozen.parameters() == {} and frozen.head_VD.grad is None
    trained = objective_for(tmp_path, train_head=True)
    before = trained.model.decoder.embedding_VD.clone()
    trained.step(0)
    assert trained.parameters()["head"].grad.any()
    assert torch.equal(trained.model.decoder.embedding_VD, before) and not before.requires_grad


def test_all_texts_of_a_joined_block_were_seen(tmp_path):
    objective = objective_for(tmp_path, llm2vec_compat=True, batch_size=1, max_length=40)
    (row,) = rows_of_step(len(objective.blocks.spans), 1, objective.config.loop.seed, 0)
    first, after = objective.blocks.texts[row]
    assert after - first > 1 and list(objective.seen(0)) == objective.texts[first:after]


def test_mask_token_must_be_one_token(tokenizer):
    assert tokenizer.backend.id_to_token(mask_token_id(tokenizer, "_")) == "_"
    with pytest.raises(ConfigError, match="mask_token '_ _ _' is"):
        mask_token_id(tokenizer, "_ _ _")


def test_blocks_without_a_token_to_hide_are_left_out(tokenizer):
    special = (1, 2)
    ids = np.array([1, 5, 6, 7, 2, 1, 2, 8, 1, 2, 2], np.int32)
    spans = np.array([[0, 5], [5, 7], [7, 9], [9, 11]])
    kept = maskable(Blocks(ids, spans, spans), special)
    assert kept.spans.tolist() == [[0, 5]] and kept.texts.tolist() == [[0, 5]]
    with pytest.raises(DataError, match="nothing but special tokens and first ones"):
        maskable(Blocks(ids, spans[1:], spans[1:]), special)


def test_joined_blocks_end_with_their_group_of_texts(tokenizer, monkeypatch):
    texts = ["one two three four five six"] * 9
    tokens = len(tokenizer.encode(texts[:1], 99).ids)
    monkeypatch.setattr("flashvec.training.mntp.COMPAT_TEXTS", 4)
    blocks = cut_blocks(tokenizer, texts, 5, True)
    starts = [start for group in range(3) for start in range(0, min(4, 9 - 4 * group) * tokens - 4, 5)]
    assert (blocks.spans[:, 0] % (4 * tokens)).tolist() == starts
    assert ((blocks.texts[:, 1] - 1) // 4 == blocks.texts[:, 0] // 4).all()  # none is of two groups
