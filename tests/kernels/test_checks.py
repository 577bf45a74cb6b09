"""What every op refuses alike: dtypes it has no arithmetic for, numbers out of range, gradients nobody would get."""

import math

import pytest
import torch

from flashvec.kernels.add_rms_norm import add_rms_norm
from flashvec.kernels.attention import Rotation, attention
from flashvec.kernels.checks import check_range, may_look
from flashvec.kernels.cross_entropy import cross_entropy
from flashvec.kernels.info_nce import info_nce
from flashvec.kernels.lora import lora
from flashvec.kernels.mean_pool import mean_pool
from flashvec.kernels.norm_rope import norm_rope
from flashvec.kernels.rms_norm import rms_norm
from flashvec.kernels.rope import rope
from flashvec.kernels.schedule import build_schedule
from flashvec.kernels.swiglu import swiglu

T, D = 4, 8
x, heads, weight, table = torch.randn(T, D), torch.randn(T, 2, D), torch.ones(D), torch.ones(T, D // 2)
rows, spans = torch.arange(T), torch.tensor([[0, 2], [2, 4]])


def attend(q, **options):
    return attention(q, heads.to(q.dtype), heads.to(q.dtype), build_schedule([T]), **{"scale": 1.0} | options)


ROWS = {  # an op of its first tensor
    "rms_norm": lambda x: rms_norm(x, weight, 1e-6),
    "add_rms_norm": lambda x: add_rms_norm(x, x, weight, 1e-6),
    "add_rms_norm, second": lambda y: add_rms_norm(x, y, weight, 1e-6),
    "mean_pool": lambda x: mean_pool(x, spans, weight, 1e-6),
    "mean_pool, delta": lambda y: mean_pool(x, spans, weight, 1e-6, delta_TD=y),
    "swiglu": swiglu,
    "rope": lambda x: rope(x[:, None].expand(T, 2, D), table, table),
    "norm_rope": lambda x: norm_rope(x[:, None].expand(T, 2, D), table, table, weight, 1e-6),
    "attention": lambda x: attend(x[:, None].expand(T, 2, D)),
    "lora": lambda x: lora(x, x.detach(), x[None, :2], x[:, :2], scales=1.0),
    "cross_entropy": lambda x: cross_entropy(x, x, rows, rows),
    "info_nce": lambda x: info_nce(x, x, rows, 0.1),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_dtypes_without_arithmetic(name, dtype):
    ROWS[name](x)
    with pytest.raises(ValueError, match=str(dtype)):
        ROWS[name](x.to(dtype))


@pytest.mark.parametrize("op", [rms_norm, lambda *a: add_rms_norm(x, *a)], ids=["rms_norm", "add_rms_norm"])
def test_what_norms_refuse(op):
    with pytest.raises(ValueError, match=r"dtype is torch\.int32"):
        op(x, weight, 1e-6, 0.0, torch.int32)
    with pytest.raises(ValueError, match=r"weight_D is torch\.int64, expected floats"):
        op(x, weight.long(), 1e-6)


@pytest.mark.parametrize("eps", [-1e-6, math.nan, math.inf])
def test_eps(eps):
    for run in (
        lambda: rms_norm(x, weight, eps),
        lambda: add_rms_norm(x, x, weight, eps),
        lambda: norm_rope(heads, table, table, weight, eps),
        lambda: mean_pool(x, spans, weight, eps),
        lambda: attend(heads, rotation=Rotation(table, table, weight, weight, eps)),
    ):
        with pytest.raises(ValueError, match=f"eps is {eps}, expected a number of at least 0"):
            run()


NUMBERS = {  # an op of a number
    "scale": lambda number: attend(heads, scale=number),
    "softcap": lambda number: attend(heads, softcap=number),
    "temperature": lambda number: info_nce(x, x, rows, number),
    "softcap of cross_entropy": lambda number: cross_entropy(x, x, rows, rows, softcap=number),
}


@pytest.mark.parametrize("number", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_must_be_positive(name, number):
    with pytest.raises(ValueError, match=f"{name.split()[0]} is {number}, expected a positive number"):
        NUMBERS[name](number)


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_the_scale_of_logits(number):
    with pytest.raises(ValueError, match=f"scale is {number}, expected a finite number"):
        cross_entropy(x, x, rows, rows, scale=number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_no_op_has_is_not_dropped(dtype):
    one = torch.ones((), dtype=dtype, requires_grad=True)
    wanted = table.to(dtype, copy=True).requires_grad_()
    cases = [
        *NUMBERS.items(),
        ("scale", lambda number: cross_entropy(x, x, rows, rows, scale=number)),
        ("scales", lambda number: lora(x, x, x[None, :2], x[:, :2], scales=number)),
    ]
    for name, run in cases:
        with pytest.raises(
            ValueError, match=f"{name.split()[0]} wants a gradient, and has none: detach it, or pass a number"
        ):
            run(one)
    for cos, sin, name in ((wanted, table, "cos_TK"), (table, wanted, "sin_TK")):
        for run in (
            lambda cos, sin: rope(heads, cos, sin),
            lambda cos, sin: norm_rope(heads, cos, sin, weight, 1e-6),
            lambda cos, sin: attend(heads, rotation=Rotation(cos, sin)),
        ):
            with pytest.raises(ValueError, match=f"{name} wants a gradient"):
                run(cos, sin)
    with torch.no_grad():
        assert torch.equal(info_nce(x, x, rows, one), info_nce(x, x, rows, 1.0))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "rope"])  # a rotation's gradient is a rotation
def test_second_derivatives_are_refused(name, interpreted):
    """torch takes zeros for the gradient of an op that has none."""
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"flashvec::\w+_bwd has no gradient: .* no create_graph=True"):
        out = ROWS[name](leaf)
        torch.autograd.grad(sum(o.sum() for o in (out if isinstance(out, tuple) else (out,))), leaf, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.float64], ids=str)
def test_rotary_tables_are_fp32(dtype):
    for run in (
        lambda cos, sin: rope(heads, cos, sin),
        lambda cos, sin: norm_rope(heads, cos, sin, weight, 1e-6),
        lambda cos, sin: attend(heads, rotation=Rotation(cos, sin)),
    ):
        for cos, sin, name in ((table.to(dtype), table, "cos_TK"), (table, table.to(dtype), "sin_TK")):
            with pytest.raises(ValueError, match=f"{name} is {dtype}, expected torch.float32"):
                run(cos, sin)


@pytest.mark.parametrize("wrong", [[-3, 2], [1, 1], [3, 2], [0, T + 1], [0, 0]])
@pytest.mark.parametrize("mode", ["mean", "max", "last"])
def test_spans_are_looked_at_on_the_cpu(wrong, mode):
    with pytest.raises(ValueError, match=rf"spans_S2 holds \[{wrong[0]}, {wrong[1]}\], expected .* at least one of 4"):
        mean_pool(x, torch.tensor([[0, 2], wrong]), weight, 1e-6, mode=mode)


def test_spans_and_weights_of_pooling_are_integers_where_the_rows_are():
    for name, x_dtype, changed in (
        ("spans_S2", "float32", {"spans_S2": spans + 0.7}),
        ("spans_S2", "bool", {"spans_S2": spans.bool()}),
        ("first_weights_S", "float32", {"first_weights_S": torch.tensor([0.5, 2.5])}),
        ("first_weights_S", "int64 on meta", {"first_weights_S": torch.ones(2, dtype=torch.int64, device="meta")}),
    ):
        with pytest.raises(ValueError, match=f"{name} is torch.{x_dtype}.*, expected int32 or int64 on cpu as x_TD"):
            mean_pool(**{"x_TD": x, "spans_S2": spans, "norm_weight_D": weight, "eps": 1e-6, **changed})


def test_positives_are_looked_at_on_the_cpu():
    for wrong, documents in ((-1, x), (T, x), (0, x[:0])):
        with pytest.raises(ValueError, match=rf"positives_B holds {wrong}, expected 0 to {len(documents) - 1}"):
            info_nce(x[:1], documents, torch.tensor([wrong]), 0.1)
    assert info_nce(x[:0], x[:0], rows[:0], 0.1).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.float32], ids=str)
def test_positives_are_indices(dtype):
    with pytest.raises(ValueError, match=rf"positives_B is \(2,\) {dtype}, expected 2 integers, int32 or int64"):
        info_nce(x[:2], x[:2], rows[:2].to(dtype), 0.1)


def test_values_are_looked_at_where_that_costs_nothing():
    assert may_look(x) and not may_look(x.to("meta"))
    check_range("rows", rows, T)
    check_range("rows", rows[:0], 0)
    with pytest.raises(ValueError, match="rows holds 3, expected 0 to 2"):
        check_range("rows", rows, T - 1)


def test_both_strides_of_vectors_are_named():
    with pytest.raises(ValueError, match=r"strides \(8, 1\) and \(1, 8\)"):
        info_nce(x, torch.randn(8, 8).T, rows, 0.1)


def test_devices_of_an_update():
    a, b, bias = x[None, :2], x[:, :2], torch.zeros(T)
    for name in ("weight_NC", "a_PRC", "b_NR", "bias_N"):
        given = {"weight_NC": x, "a_PRC": a, "b_NR": b, "bias_N": bias}
        given[name] = given[name].to("meta")
        with pytest.raises(ValueError, match=f"{name} is on meta, x_TC on cpu"):
            lora(x, scales=1.0, **given)
