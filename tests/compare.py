"""The criterion of `bench/criterion.py` as an assertion."""

from torch import Tensor

from flashvec.bench.criterion import distance, wider

__all__ = ["assert_as_close_as_torch", "wider"]


def assert_as_close_as_torch(got: Tensor, same_dtype: Tensor, truth: Tensor) -> None:
    """`truth` is the reference run in `wider(got.dtype)`, `same_dtype` the reference run in the dtype of `got`."""
    assert got.dtype == same_dtype.dtype and got.shape == truth.shape
    found = distance(got, same_dtype, truth)
    assert found.passed, str(found)
