import pytest
import torch

from flashvec.kernels.schedule import Group, build_schedule


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
    with pytest.raises(ValueError, match=r"\[2, 0\]"):
        build_schedule([2, 0])
    with pytest.raises(ValueError, match="num_rows is 3"):
        build_schedule([4], num_rows=3)
