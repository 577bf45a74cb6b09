"""The criterion of `bench/criterion.py` as an assertion."""

from collections.abc import Sequence

from torch import Tensor

from flashvec.bench.criterion import distance, wider

__all__ = ["assert_as_close_as_torch", "enough", "wider"]


LEAST_NUMBERS = 512


def enough(lengths: Sequence[int], numbers_of_token: int) -> list[int]:
    """Lengths as often as a result of `LEAST_NUMBERS` takes.

    Of a few numbers torch's largest error is a fraction of a rounding by luck, and twice it says nothing of an op.
    """
    return [*lengths] * max(1, -(-LEAST_NUMBERS // max(1, sum(lengths) * numbers_of_token)) if sum(lengths) else 1)


def assert_as_close_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """`truth` is the reference run in `wider(got.dtype)`, `same_dtype` the reference run in the dtype of `got`."""
    assert got.dtype == same_dtype.dtype and got.shape == truth.shape
    found = distance(got, same_dtype, truth)
    assert found.passed, str(found)
