import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashvec.runtime.packing import pack


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(1, 120))
def test_every_text_once_and_no_pack_over_budget(lengths, budget):
    packs = list(pack(lengths, budget))
    assert sorted(np.concatenate(packs).tolist() if packs else []) == list(range(len(lengths)))
    for indices in packs:
        assert sum(lengths[i] for i in indices) <= budget or len(indices) == 1


def test_longest_first_and_equal_lengths_together():
    order = np.concatenate(list(pack([2, 9, 2, 5, 9], budget=100)))
    assert order.tolist() == [1, 4, 3, 0, 2]


@pytest.mark.parametrize("budget", [7, 8])
def test_fills_up_to_the_budget(budget):
    assert [len(p) for p in pack([4, 4, 4], budget)] == ([1, 1, 1] if budget == 7 else [2, 1])
