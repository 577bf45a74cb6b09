import numpy as np
import torch
from fake_accelerator import FakeAccelerator
from hypothesis import given
from hypothesis import strategies as st

from flashvec.kernels.schedule import NO_SEQUENCE, TileClass, build_schedule
from flashvec.runtime.batches import NO_TOKEN, StaticBatch, TokenRows, device_batch

CLASSES = (TileClass(64, 0, 64), TileClass(128, 64))
ROWS, SEQUENCES = 256, 8


def token_rows(lengths, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.array(lengths, dtype=np.int32)
    ids = rng.integers(1, 1000, lengths.sum(), dtype=np.int32)
    return TokenRows(ids, lengths, np.stack([np.zeros_like(lengths), lengths], 1).astype(np.int64))


def test_one_copy_holds_what_a_schedule_built_by_itself_has():
    rows, accelerator = token_rows([70, 9, 9, 1]), FakeAccelerator()
    batch, want = device_batch(rows, (128,), CLASSES, accelerator), build_schedule([70, 9, 9, 1], 128)
    assert accelerator.events == ["send"]
    for name in ("groups", "num_tokens", "max_length", "lengths", "is_static"):
        assert getattr(batch.schedule, name) == getattr(want, name), name
    for name in ("cu_seqlens", "positions"):
        assert torch.equal(getattr(batch.schedule, name), getattr(want, name)), name
    for tile_class in CLASSES:
        assert torch.equal(batch.schedule.tiles(tile_class), want.tiles(tile_class))
    assert accelerator.events == ["send"]
    assert batch.ids_T.tolist() == rows.ids.tolist() and batch.spans_B2.tolist() == rows.spans.tolist()
    fields = (batch.ids_T, batch.spans_B2, batch.schedule.cu_seqlens, *(batch.schedule.tiles(c) for c in CLASSES))
    assert all(x.storage_offset() % 32 == 0 for x in fields)  # 128 bytes: kernels are compiled for aligned pointers


def test_takes_texts_in_any_order():
    rows = token_rows([2, 1, 3])
    own = rows.take(np.array([2, 0]))
    assert own.lengths.tolist() == [3, 2] and own.ids.tolist() == [*rows.ids[3:], *rows.ids[:2]]


lengths_of_a_bucket = st.lists(st.integers(1, ROWS), min_size=1, max_size=SEQUENCES).filter(lambda n: sum(n) <= ROWS)


@given(lengths_of_a_bucket, lengths_of_a_bucket)
def test_any_batch_of_a_bucket_can_be_written_over_any_other(first, second):
    """No trace of the first is left, and what the host knows is the same for both."""
    accelerator = FakeAccelerator()
    buffers = StaticBatch(token_rows(first, 1), ROWS, SEQUENCES, CLASSES, accelerator)
    fresh = StaticBatch(token_rows(second, 2), ROWS, SEQUENCES, CLASSES, accelerator)
    buffers.write(token_rows(second, 2))
    assert torch.equal(buffers.buffer, fresh.buffer)
    a, b = buffers.batch.schedule, fresh.batch.schedule
    assert (a.groups, a.num_tokens, a.max_length, a.is_static) == (b.groups, b.num_tokens, b.max_length, b.is_static)
    assert len(a.cu_seqlens) == SEQUENCES + 1 and a.cu_seqlens[-1] == sum(second)
    assert (buffers.batch.ids_T[sum(second) :] == NO_TOKEN).all()
    for tile_class in CLASSES:
        tiles, want = a.tiles(tile_class), build_schedule(second).tiles(tile_class)
        assert torch.equal(tiles[: len(want)], want) and (tiles[len(want) :, 3] == NO_SEQUENCE).all()
        assert tiles.data_ptr() == buffers.buffer.data_ptr() + 4 * tiles.storage_offset()
