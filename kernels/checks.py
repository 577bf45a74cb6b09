"""What ops ask of their arguments before they run: every one raises ValueError with the value it found."""

from typing import Any

import torch
from torch import Tensor

from flashvec.kernels.backend import needs_gradient

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # the last by references alone
INTEGERS = (torch.int32, torch.int64)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise unless this is a dtype that ops compute or round to."""
    if dtype not in FLOATS:
        raise ValueError(f"{name} is {dtype}, expected one of {FLOATS}")


def check_rows(name: str, x_TD: Tensor) -> None:
    """Raise unless the elements of a row are floats that lie side by side."""
    check_dtype(name, x_TD.dtype)
    if x_TD.shape[-1] > 1 and x_TD.stride(-1) != 1:
        raise ValueError(f"{name}'s rows must be contiguous, its strides are {x_TD.stride()}")


def check_weight(name: str, weight_D: Tensor, x_TD: Tensor) -> None:
    """Raise unless a weight has a float for each column of `x_TD`, on the same device."""
    if weight_D.shape != x_TD.shape[-1:]:
        raise ValueError(f"{name} is {tuple(weight_D.shape)}, x_TD's rows have {x_TD.shape[-1]} elements")
    if not weight_D.is_floating_point():
        raise ValueError(f"{name} is {weight_D.dtype}, expected floats")
    if weight_D.device != x_TD.device:
        raise ValueError(f"{name} is on {weight_D.device}, x_TD on {x_TD.device}")


def check_eps(eps: float) -> None:
    """Raise unless a norm's eps can be added to a mean square."""
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}, expected a number of at least 0")


def check_positive(name: str, value: float, otherwise: str = "") -> None:
    """Raise unless an option is a positive, finite number whose gradient nobody wants."""
    check_constant(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a positive number{otherwise}")


def check_constant(name: str, value: Any) -> None:
    """Raise if an option's gradient is wanted: ops have none, and would drop it without a word."""
    if isinstance(value, Tensor) and needs_gradient(value):
        raise ValueError(f"{name} wants a gradient, and has none: detach it, or pass a number")


def check_range(name: str, values: Tensor, limit: int) -> None:
    """Raise unless integers lie from 0 to below `limit`; of tensors on the CPU alone, on a GPU it would wait."""
    if not values.numel():
        return
    least, most = (int(x) for x in values.aminmax())
    if least < 0 or most >= limit:
        raise ValueError(f"{name} holds {least if least < 0 else most}, expected 0 to {limit - 1}")


def check_spans(spans_S2: Tensor, T: int) -> None:
    """Raise unless every span has rows, and these are among T; of tensors on the CPU alone."""
    start_S, stop_S = spans_S2.unbind(1)
    wrong_S = (start_S < 0) | (start_S >= stop_S) | (stop_S > T)
    if wrong_S.any():
        found = spans_S2[wrong_S][0].tolist()
        raise ValueError(f"spans_S2 holds {found}, expected first row and one past the last, at least one of {T}")


def may_look(x: Tensor) -> bool:
    """True if the values of a tensor can be looked at for nothing: on a CPU, and not in a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
