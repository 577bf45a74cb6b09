"""Hugging Face's models on the packed attention: as close to fp64 as on their own, forward and backward."""

import copy
from functools import cache

import pytest
import torch
from compare import assert_as_close_as_torch
from tiny_models import tiny_checkpoint, tiny_model
from transformers import AttentionInterface, BartConfig, BartModel, BertConfig, BertModel

from flashvec.runtime import hf_attention
from flashvec.runtime.hf_attention import NAME, register_with_transformers

register_with_transformers()

LENGTHS = (12, 1, 7, 13)
MODELS = {
    "llama": ("llama", {}),
    "llama bidirectional": ("llama", {"is_causal": False}),
    "llama dropout": ("llama", {"attention_dropout": 0.25}),
    "qwen2": ("qwen2", {}),
    "qwen3 bidirectional": ("qwen3", {"is_causal": False}),
    "mistral window": ("mistral", {"sliding_window": 5}),
    "gemma2 bidirectional window softcap": ("gemma2", {"is_causal": False}),
    "gemma3": ("gemma3", {}),
    "gemma3 bidirectional": ("gemma3", {"is_causal": False}),
    "gemma3 two-sided": ("gemma3", {"use_bidirectional_attention": True, "sliding_window": 8}),
}


def padded(side, seed=0):
    """Token ids [B, n] and mask, each row padded on a side."""
    generator = torch.Generator().manual_seed(seed)
    n = max(LENGTHS)
    ids, mask = torch.zeros(len(LENGTHS), n, dtype=torch.int64), torch.zeros(len(LENGTHS), n, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        own = slice(0, length) if side == "right" else slice(n - length, n)
        ids[row, own] = torch.randint(3, 400, (length,), generator=generator)
        mask[row, own] = 1
    return ids, mask


def variants(name):
    """A model on our attention and on eager attention."""
    family, keys = MODELS[name]
    ours = tiny_model(None, family, num_hidden_layers=2, **keys)
    eager = copy.deepcopy(ours)
    ours.set_attn_implementation(NAME)
    eager.set_attn_implementation("eager")
    return ours, eager


@cache
def oracle(name):
    """States and gradients of eager attention in fp32 and in fp64."""
    _, eager = variants(name)
    ids, mask = padded("right")
    same_dtype = alone(eager, ids, mask)
    return list(zip(same_dtype, alone(eager.double(), ids, mask), strict=True))


def alone(model, ids, mask):
    """Each text by itself: with padding around, eager attention gives NaN where a row sees nothing."""
    rows = [row[own][None] for row, own in zip(ids, mask.bool(), strict=True)]
    return gradients_of(model, torch.cat([model(input_ids=row).last_hidden_state[0] for row in rows]))


def states_and_gradients(model, mask, **inputs):
    return gradients_of(model, model(**inputs).last_hidden_state[mask.bool()])


def gradients_of(model, states):
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(1)).to(states.dtype)
    gradients = torch.autograd.grad((states * weights).sum(), list(model.parameters()))
    return states.detach(), torch.cat([(g / g.abs().max().clamp(min=1e-3)).flatten() for g in gradients])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_as_close_to_fp64_as_eager(name, side):
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ours, _ = variants(name)
    got = states_and_gradients(ours, mask, input_ids=ids, attention_mask=mask, position_ids=positions)
    for one, (same_dtype, exact) in zip(got, oracle(name), strict=True):
        assert_as_close_as_torch(one, same_dtype, exact)


@pytest.mark.parametrize("by", ["lengths", "positions"])
@pytest.mark.parametrize("name", MODELS)
def test_flattened(name, by):
    """One row of all tokens, no padding anywhere: as each text by itself."""
    ids, mask = padded("right")
    ours, _ = variants(name)
    flat, positions = ids[mask.bool()][None], torch.cat([torch.arange(n) for n in LENGTHS])[None]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    keys = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 13, "max_length_k": 13}
    got = states_and_gradients(
        ours, torch.ones_like(flat), input_ids=flat, position_ids=positions, use_cache=False,
        **(keys if by == "lengths" else {}),
    )  # fmt: skip
    for one, (same_dtype, exact) in zip(got, oracle(name), strict=True):
        assert_as_close_as_torch(one, same_dtype, exact)


def test_cross_attention_is_refused():
    """Of texts of one length it gave zeros to tokens whose place is padding in the other text."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 420}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    bart = BartModel(BartConfig(**sizes, **heads)).eval()
    bert = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    decoder = BertModel(BertConfig(**bert, vocab_size=420, is_decoder=True, add_cross_attention=True)).eval()
    ids, mask = padded("right")
    other = {"encoder_hidden_states": torch.randn(*ids.shape, 32), "encoder_attention_mask": mask}
    for model, keys in ((bart, {"attention_mask": mask, "decoder_input_ids": ids}), (decoder, other)):
        model.set_attn_implementation(NAME)
        with pytest.raises(ValueError, match="knows no cross-attention"):
            model(input_ids=ids, use_cache=False, **keys)
    ours, eager = bart.encoder, copy.deepcopy(bart.encoder)
    eager.set_attn_implementation("eager")
    with torch.inference_mode():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (ours, eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama bidirectional", "gemma3 two-sided"])
def test_positions_left_out_end_no_sequence(name):
    """Training for long contexts skips positions within a text."""
    ours, eager = variants(name)
    ids, positions = padded("right")[0][-1:], torch.tensor([[*range(5), *range(40, 48)]])
    keys = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    with torch.inference_mode():
        got, want = (model(**keys).last_hidden_state for model in (ours, eager))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama bidirectional", "gemma3 two-sided"])
def test_sdpa_sees_the_same(name):
    ours, eager = variants(name)
    eager.set_attn_implementation("sdpa")
    ids, mask = padded("right")
    with torch.inference_mode():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (ours, eager))
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
        one = ours(input_ids=ids[:1, :12]).last_hidden_state  # no mask at all, and a cache on its first use
        torch.testing.assert_close(one[0], want[0, :12], rtol=1e-4, atol=1e-4)


def test_direction_and_window_are_the_masks_own(monkeypatch):
    """What is worked out from masks, and that the window of each side is told apart."""
    ids, mask = padded("right")
    seen, plans, read = {}, [], hf_attention._read
    monkeypatch.setattr(hf_attention, "_read", lambda *a: plans.append(read(*a)) or plans[-1])
    for name in MODELS:
        ours, _ = variants(name)
        plans.clear()
        with torch.inference_mode():
            ours(input_ids=ids, attention_mask=mask)
        assert all(p.layout.schedule.lengths == LENGTHS for p in plans)
        seen[name] = sorted({(p.causal, p.window) for p in plans}, key=str)
    assert seen["llama"] == [(True, None)] and seen["qwen3 bidirectional"] == [(False, None)]
    assert seen["mistral window"] == [(True, 4)]
    assert seen["gemma3"] == [(True, 5), (True, None)]  # 6 tokens, itself counted
    assert seen["gemma3 bidirectional"] == [(False, 6), (False, None)]  # transformers reads it otherwise both ways
    assert seen["gemma3 two-sided"] == [(False, 4), (False, None)]
    assert len(hf_attention._plans) == 0  # nothing outlives its forward


@pytest.mark.parametrize("name", ["llama", "llama bidirectional", "qwen3 bidirectional"])
def test_a_mask_that_was_copied_on_the_way_keeps_the_direction(name, monkeypatch):
    """Where layers lie on several devices, all but the first device's are given copies."""
    ours, _ = variants(name)
    ids, mask = padded("right")
    with torch.inference_mode():
        want = ours(input_ids=ids, attention_mask=mask).last_hidden_state
        attend = hf_attention._attend
        copied = lambda module, q, k, v, m, *a, **keys: attend(module, q, k, v, m.clone(), *a, **keys)  # noqa: E731
        monkeypatch.setitem(AttentionInterface._global_mapping, NAME, copied)
        got = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.equal(got[mask.bool()], want[mask.bool()])


def test_a_buffer_of_inference_mode_may_be_written_anew():
    ours, _ = variants("llama")
    ids, _ = padded("right")
    with torch.inference_mode():
        bounds, states = torch.tensor([0, 5, 13], dtype=torch.int32), []
        for middle in (5, 9, 5):
            bounds[1] = middle
            states.append(ours(input_ids=ids[3:], cu_seq_lens_q=bounds, use_cache=False).last_hidden_state)
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])


def test_a_mask_is_read_once_a_forward(monkeypatch):
    calls = []
    read, build = hf_attention._read, hf_attention.build_schedule
    monkeypatch.setattr(hf_attention, "_read", lambda *a: calls.append("read") or read(*a))
    monkeypatch.setattr(hf_attention, "build_schedule", lambda *a, **k: calls.append("build") or build(*a, **k))
    ours, _ = variants("llama")
    ids, mask = padded("right")
    ours(input_ids=ids, attention_mask=mask)
    assert calls == ["read", "build"]  # for both layers
    calls.clear()
    bounds = torch.tensor([0, 5, 13], dtype=torch.int32)
    ours(input_ids=ids[3:], cu_seq_lens_q=bounds, use_cache=False)
    assert calls == ["read", "build", "build"]
    calls.clear()
    bounds[1] = 9  # the caller's buffer, written anew
    split = ours(input_ids=ids[3:], cu_seq_lens_q=bounds, use_cache=False).last_hidden_state
    assert calls == ["read", "build", "build"]
    assert not torch.allclose(split[0, 12], ours(input_ids=ids[3:]).last_hidden_state[0, 12], atol=1e-3)


def test_gradient_checkpointing_and_autocast():
    ours, eager = variants("llama bidirectional")
    ids, mask = padded("left")
    plain = states_and_gradients(ours, mask, input_ids=ids, attention_mask=mask)
    ours.train()
    ours.gradient_checkpointing_enable()
    again = states_and_gradients(ours, mask, input_ids=ids, attention_mask=mask)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)
    ours.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (ours, eager))
    assert torch.nn.functional.cosine_similarity(got.float(), want.float()).min() > 0.99


@pytest.mark.parametrize("name", ["llama", "llama bidirectional", "gemma2 bidirectional window softcap"])
def test_trains_under_autocast(name):
    ours, eager = variants(name)
    ids, mask = padded("right")
    with torch.autocast("cpu", torch.bfloat16):
        got = states_and_gradients(ours, mask, input_ids=ids, attention_mask=mask)
        same_dtype = alone(eager, ids, mask)
    for one, same, (_, exact) in zip(got, same_dtype, oracle(name), strict=True):
        assert_as_close_as_torch(one, same, exact)


def test_dropout_trains_under_autocast():
    ours, _ = variants("llama dropout")
    ours.train()
    ids, mask = padded("right")
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(input_ids=ids, attention_mask=mask).last_hidden_state.square().mean()
    loss.backward()  # outside, as trainers do
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_compiled_models_run():
    ours, eager = variants("llama")
    ids, mask = padded("right")
    compiled = torch.compile(ours, backend="eager")
    with torch.inference_mode():
        got, want = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (compiled, eager))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_dropout_follows_torchs_generator():
    ours, _ = variants("llama dropout")
    ours.train()
    ids, mask = padded("right")

    def run(seed):
        torch.manual_seed(seed)
        return states_and_gradients(ours, mask, input_ids=ids, attention_mask=mask)

    first, same, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True)) and not torch.equal(first[0], other[0])
    ours.gradient_checkpointing_enable()
    for a, b in zip(first, run(0), strict=True):  # recomputation draws the same masks
        torch.testing.assert_close(a, b)


# --- what it refuses ------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_see_as_such():
    ours, _ = variants("llama")
    ids, _ = padded("right")
    with pytest.raises(ValueError, match=r"given as a tensor \[4, 1, 13, 13\]: use 'sdpa'"):
        ours(input_ids=ids, attention_mask=torch.zeros(4, 1, 13, 13))
    cached = ours(input_ids=ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"1 queries at 6 do not go with 7 keys at 0; for generation .* use 'sdpa'"):
        ours(input_ids=ids[:, 6:7], past_key_values=cached)
    with pytest.raises(ValueError, match="cu_seq_lens_q ends at 12, the batch has 1 x 13 tokens"):
        ours(input_ids=ids[3:], cu_seq_lens_q=torch.tensor([0, 12]), use_cache=False)
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match="does not take s_aux"):
        hf_attention._attend(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(2))
    with pytest.raises(ValueError, match="calls flash attention's functions itself"):
        hf_attention._refuse()


@pytest.mark.parametrize(
    ("sees", "message"),
    [
        (lambda b, h, q, k: (q // 5 == k // 5) | (k <= q), "reaches 39 tokens back and 4 ahead"),  # whole blocks
        (lambda b, h, q, k: (k <= q) & ((q < 20) | (k > 3)), "one of another shape"),
        (lambda b, h, q, k: (q - k <= 5) & (k - q <= 2), "reaches 5 tokens back and 2 ahead"),
        (lambda b, h, q, k: (q - k).abs() % 2 == 0, "one of another shape"),
    ],
)
def test_refuses_masks_of_other_shapes(sees, message):
    with pytest.raises(ValueError, match=message):
        hf_attention._mask(2, 40, 40, mask_function=sees)


@pytest.mark.parametrize(
    ("sees", "message"),
    [
        (lambda b, h, q, k: (k <= q) | ((q // 8 == 150) & (k // 8 == 150)), "one of another shape"),  # an image
        (lambda b, h, q, k: (k <= q) | ((b == 2) & (k < 8)), "one of another shape"),  # a prefix in one row
        (lambda b, h, q, k: (k <= q) & ((q - k < 32) | (k == 0)), "one of another shape"),
        (lambda b, h, q, k: (k <= q) & ((q - k < 32) | (b == 1)), "one of another shape"),  # a row without the window
        (lambda b, h, q, k: (k <= q) | (h == 1), "another for each head"),
        (lambda b, h, q, k: torch.tensor([32, 64])[h] >= (q - k).abs(), "another for each head"),
    ],
)
def test_refuses_other_shapes_anywhere_in_a_long_batch(sees, message):
    with pytest.raises(ValueError, match=message):
        hf_attention._mask(4, 4096, 4096, mask_function=sees)


def test_padding_in_the_middle():
    mask = torch.tensor([[1, 1, 0, 1, 1, 1]])
    plan = hf_attention._plans[
        hf_attention._mask(1, 6, 6, mask_function=lambda b, h, q, k: k <= q, attention_mask=mask)
    ]
    assert plan.layout.schedule.lengths == (5,) and plan.causal
    with pytest.raises(ValueError, match="a window over sequences with padding in their middle"):
        hf_attention._mask(1, 6, 6, mask_function=lambda b, h, q, k: (q - k).abs() <= 2, attention_mask=mask)


def test_rows_of_padding_alone_are_zero():
    ours, _ = variants("llama")
    ids, mask = padded("right")
    mask[2] = 0
    with torch.inference_mode():
        got = ours(input_ids=ids, attention_mask=mask).last_hidden_state
    assert got.isfinite().all()
    nothing = hf_attention._mask(2, 3, 3, mask_function=lambda b, h, q, k: k <= q, attention_mask=torch.zeros(2, 3))
    q = torch.randn(2, 2, 3, 16)
    out, _ = hf_attention._attend(torch.nn.Module(), q, q, q, nothing)
    assert out.shape == (2, 3, 2, 16) and not out.any()


# --- sentence-transformers --------------------------------------------------------------------------------


def test_sentence_transformers_flattens_and_gives_the_same_vectors(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tiny_checkpoint(tmp_path / "decoder", "llama", is_causal=False)
    texts = ["Mix flour and water", "x", "The cat sleeps at the window, and nobody wakes it.", "summit"]
    vectors, flat = {}, {}
    for name in (NAME, "sdpa"):
        transformer = Transformer(str(tmp_path / "decoder"), model_kwargs={"attn_implementation": name})
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device="cpu")
        vectors[name], flat[name] = model.encode(texts, convert_to_tensor=True), transformer.can_flatten_inputs
    assert flat == {NAME: True, "sdpa": False}
    torch.testing.assert_close(vectors[NAME], vectors["sdpa"], rtol=1e-4, atol=1e-5)


def test_registering_twice_changes_nothing():
    from transformers.integrations import hub_kernels

    before = hub_kernels.load_and_register_attn_kernel
    register_with_transformers()
    assert hub_kernels.load_and_register_attn_kernel is before
    assert before("flash_attention_9") is None  # other names go to transformers' own
