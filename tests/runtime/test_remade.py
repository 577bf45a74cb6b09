import torch

from flashvec.runtime.remade import remade, watched


class Scaled(torch.autograd.Function):
    """x * w, which keeps both."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * w, grad * x


def graph(source, w, is_remade, made):
    """(2 source) * w, its middle kept or made again; `made` counts."""

    def again():
        made.append(torch.is_grad_enabled())
        return source.detach() * 2

    middle = source * 2
    with remade(middle, again if is_remade else None):
        return Scaled.apply(middle, w)


def test_gradients_are_those_of_a_graph_that_keeps():
    found = []
    for is_remade in (False, True):
        source, w = torch.arange(6.0).requires_grad_(), torch.linspace(1, 2, 6).requires_grad_()
        made: list[bool] = []
        out = graph(source, w, is_remade, made)
        assert not made
        out.square().sum().backward()
        assert made == ([False] if is_remade else [])
        found.append((source.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_tensor_is_freed_and_the_rest_is_watched():
    source, w = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    for is_remade in (False, True):
        seen: list[torch.Tensor] = []
        with watched(seen.append):
            out = graph(source, w, is_remade, [])
        assert any(x.data_ptr() == w.data_ptr() for x in seen)
        assert any(torch.equal(x, torch.full((4,), 2.0)) for x in seen) is not is_remade
        out.sum().backward()
    seen = []
    graph(source, w, True, [])
    assert not seen


def test_several_are_made_again_and_views_of_all_of_one_too():
    x = torch.arange(6.0).view(2, 3)
    w = torch.linspace(1, 2, 12).view(4, 3)
    out, found = {}, {}
    for is_remade in (False, True):
        own_x, own_w = x.clone(), w.clone()
        made, seen = [], []
        update = torch.ones(2, 3, requires_grad=True)

        def again(name, value, made=made):
            made.append(name)
            return value.clone()

        with watched(seen.append):
            h = own_x * update
            with (
                remade(own_x, (lambda: again("x", x)) if is_remade else None),
                remade(own_w, (lambda: again("w", w)) if is_remade else None),
            ):
                y = torch.nn.functional.linear(h * own_x, own_w)  # keeps the weight, or its transpose
        kept = {t.data_ptr() for t in seen}
        assert (own_w.data_ptr() in kept) is not is_remade
        out[is_remade] = y.detach()
        y.square().sum().backward()
        assert sorted(made) == (["w", "x"] if is_remade else [])
        found[is_remade] = update.grad
    assert torch.equal(out[False], out[True]) and torch.equal(found[False], found[True])


def test_one_with_gaps_between_rows_is_given_without_them():
    found = []
    for is_remade in (False, True):
        wide, w = torch.arange(20.0).view(4, 5), torch.linspace(1, 2, 12).view(4, 3).requires_grad_()
        x = wide[:, :3]
        with remade(x, (lambda x=x: x.clone(memory_format=torch.contiguous_format)) if is_remade else None):
            Scaled.apply(x, w).square().sum().backward()
        found.append(w.grad)
    assert torch.equal(*found)
