from dataclasses import replace

import numpy as np
import pytest
import torch

from flashvec.kernels.schedule import NO_SEQUENCE, Group, TileClass, build_schedule, select_queries


def test_equal_neighbours_form_one_group():
    schedule = build_schedule([3, 3, 2, 3])
    assert schedule.groups == (Group(0, 2, 3), Group(6, 1, 2), Group(8, 1, 3))
    assert schedule.cu_seqlens.tolist() == [0, 3, 6, 8, 11]
    assert schedule.cu_seqlens.dtype == torch.int32
    assert schedule.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 0, 1, 2]
    assert (schedule.num_tokens, schedule.max_length) == (11, 3)


def test_filling_rows_have_position_zero():
    schedule = build_schedule([2], num_rows=16)
    assert schedule.positions.tolist() == [0, 1] + [0] * 14
    assert schedule.cu_seqlens.tolist() == [0, 2]


def test_no_sequences():
    schedule = build_schedule([])
    assert schedule.groups == () and schedule.cu_seqlens.tolist() == [0]


def test_rejects_what_it_cannot_lay_out():
    with pytest.raises(ValueError, match=r"\[2, -1\]"):
        build_schedule([2, -1])
    with pytest.raises(ValueError, match="identities"):
        build_schedule([2, 1], identities=[5])
    with pytest.raises(ValueError, match="num_rows is 3"):
        build_schedule([4], num_rows=3)
    with pytest.raises(ValueError, match=r"lengths are \[2.0, 1\], expected whole numbers"):
        build_schedule([2.0, 1])
    for identities in ([0.5, 1.7], [1, 2**31], torch.tensor([2**40, 0])):
        with pytest.raises(ValueError, match=r"identities are \[.*\], expected whole numbers that fit int32"):
            build_schedule([2, 1], identities=identities)


def test_lengths_may_be_a_tensor_or_an_array():
    for lengths in (torch.tensor([2, 0, 3]), np.array([2, 0, 3])):
        schedule = build_schedule(lengths)
        assert schedule == replace(
            build_schedule([2, 0, 3]), cu_seqlens=schedule.cu_seqlens, positions=schedule.positions
        )
        assert all(type(n) is int for n in (*schedule.lengths, schedule.num_tokens, schedule.max_length))


def test_tiles_name_their_tokens_longest_sequences_first():
    schedule = build_schedule([3, 0, 9, 5])
    assert schedule.tiles(TileClass(4)).tolist() == [
        *[[3, 9, first, 2] for first in (0, 4, 8)],
        *[[12, 5, first, 3] for first in (0, 4)],
        [0, 3, 0, 0],
    ]


def test_tile_classes_part_sequences_by_their_own_length():
    schedule = build_schedule([3, 9, 4, 5])
    short, long = TileClass(4, longest=4), TileClass(8, shorter=4)
    assert schedule.tiles(short).tolist() == [[12, 4, 0, 2], [0, 3, 0, 0]]
    assert schedule.tiles(long).tolist() == [[3, 9, 0, 1], [3, 9, 8, 1], [16, 5, 0, 3]]
    assert schedule.tiles(short) is schedule.tiles(short)


def test_static_tile_lists_hold_any_batch_of_their_size():
    small, large = (build_schedule(n, num_rows=16, is_static=True) for n in ([1, 2], [15, 1]))
    for schedule in (small, large):
        tiles = schedule.tiles(TileClass(4))
        assert tiles.shape == (16 // 4 + 2, 4)
        used = tiles[tiles[:, 3] != NO_SEQUENCE]
        assert len(used) == sum(-(-n // 4) for n in schedule.lengths)


def test_identity_of_rows():
    schedule = build_schedule([2, 0, 1], num_rows=5, identities=[7, 8, 9])
    assert schedule.identity_of_rows().tolist() == [7, 7, 9, 0, 0]
    with pytest.raises(ValueError, match="identities"):
        build_schedule([2]).identity_of_rows()


def test_selected_queries_have_rows_and_tiles_of_their_own():
    schedule = build_schedule([3, 0, 9])
    queries = select_queries(schedule, np.array([[2, 3], [0, 0], [1, 8]]), num_rows=10)
    assert queries.rows.tolist() == [2, 4, 5, 6, 7, 8, 9, 10, 0, 0] and queries.num_tokens == 8
    assert queries.shift_stop.tolist() == [[-2, 3], [1, 0], [0, 8]]
    assert queries.tiles(TileClass(4)).tolist() == [[3, 9, 1, 2], [3, 9, 5, 2], [0, 3, 2, 0]]


@pytest.mark.parametrize("spans", [[[0, 4]], [[-1, 2]], [[0, 1], [0, 1]]], ids=str)
def test_selected_queries_must_lie_in_their_sequence(spans):
    with pytest.raises(ValueError, match="do not lie in"):
        select_queries(build_schedule([3]), np.array(spans))
    with pytest.raises(ValueError, match="num_rows is 1"):
        select_queries(build_schedule([3]), np.array([[0, 2]]), num_rows=1)
