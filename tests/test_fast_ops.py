"""Each operation that loops may take over: loops and torch, held to a library, over widths and types."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from fedtorch.fast import ops
from fedtorch.kernels.compile import available, loops
from loop_case import close, drawn

WIDTHS = (1, 3, 15, 16, 17, 64, 81, 200)
DTYPES = (torch.float32, torch.float64)
BY_TORCH = ops.Ops()


def both() -> list[ops.Ops]:
    """Torch, and the loops where there are any."""
    return [BY_TORCH, loops("fedtorch.kernels.loops").Loops()] if available() else [BY_TORCH]


def few(*shape: int, share: float = 0.2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of which most are 0."""
    draw = torch.Generator().manual_seed(sum(shape))
    return drawn(*shape, dtype=dtype) * (torch.rand(shape, generator=draw) < share)


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", ["", "relu", "mask"])
@pytest.mark.parametrize(("B", "s"), [(1, 0), (2, 0), (3, 3), (4, 8), (5, 10)])
def test_append(by, B, s, end, dtype):
    for p, q in ((1, 17), (15, 200), (16, 3), (64, 64), (81, 7)):
        x, X, G = (drawn(*n, dtype=dtype) for n in ((2, B, p), (3, 15, p), (3, 15, 15)))
        z, Y = drawn(2, B, q, dtype=dtype), drawn(3, 15, q, dtype=dtype)
        before, e, keep = (X.clone(), G.clone(), z.clone()), s + B, 0.7 if s else 1.0
        found = by.append(z, x, (X, G, Y), s, 1.0, keep, end)
        assert found.data_ptr() == z.data_ptr() and torch.equal(X[:2, s:e], x)
        close(G[:2, s:e, :e], x @ X[:2, :e].mT + 1)
        wanted = before[2] * keep - G[:2, s:e, :s] @ Y[:2, :s]
        close(
            found,
            {"": wanted, "relu": wanted.relu(), "mask": wanted * (Y[:2, s:e] > 0)}[end],
        )
        for now, then in zip((X, G), before, strict=False):  # nothing else is touched
            now[:2, s:e, :e] = then[:2, s:e, :e] = 0
            assert torch.equal(now, then) if now is G else torch.equal(now[:, e:], then[:, e:])


COUNTS = np.array([5, 0, 4, 1])
SHAPES = (1, 7), (16, 33), (40, 64), (7, 81), (3, 200)
"""Outputs and inputs of a layer."""


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_weights_of_ones_own(by, dtype):
    for (q, p), biased in itertools.product(SHAPES, (True, False)):
        a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
        a[1], d[3, 1:] = torch.nan, torch.inf  # no examples
        numbers = drawn(6, 2 * q * p + 3, dtype=dtype)  # others stand beside them in memory
        weight, bias = numbers[:, 1 : 1 + q * p].view(6, q, p), drawn(6, 1, q, dtype=dtype)
        z = by.outputs(a, weight, bias if biased else None, COUNTS)
        down = by.inputs(d, weight, COUNTS)
        assert z.shape == d.shape and down.shape == a.shape
        for k, n in ((0, 5), (2, 4), (3, 1)):
            close(z[k, :n], a[k, :n] @ weight[k].T + (bias[k] if biased else 0))
            close(down[k, :n], d[k, :n] @ weight[k])


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_gradients_are_those_of_real_examples(by, dtype):
    for (q, p), biased in itertools.product(SHAPES, (True, False)):
        a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
        a[2, 4:] = torch.nan  # no example
        flat = torch.full((q * p + q + 2,), 7.0, dtype=dtype)
        weight, bias = flat[1 : 1 + q * p].view(q, p), flat[1 + q * p : 1 + q * p + q]
        write = by.sums(d, a, COUNTS, weight, bias if biased else None)
        for k, n in enumerate(COUNTS):
            write(k)
            close(weight, d[k, :n].T @ a[k, :n])
            close(bias, d[k, :n].sum(0) if biased else torch.full((q,), 7.0, dtype=dtype))
            assert flat[0] == flat[-1] == 7


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", WIDTHS)
def test_coefficients(by, q, dtype):
    for B, end in itertools.product((1, 3, 4), ("", "relu")):
        z, G = drawn(15, q, dtype=dtype), drawn(3, 5, 7, dtype=dtype)
        local = torch.randint(5, (3, 4 * B), generator=torch.Generator().manual_seed(B))
        index = local + torch.arange(3)[:, None] * 5  # some examples come twice, in a step too
        before, rows = z.clone(), torch.zeros(3, 7, q, dtype=dtype)
        made = by.coefficients(z, G, (index, local))
        for t, k in enumerate((3, 3, 2, 2)):
            at = slice(t * B, (t + 1) * B)
            own = torch.stack([G[c, local[c, at]] for c in range(k)])
            wanted = 0.9 * z[index[:k, at]] - 0.3 * own @ rows[:k]
            close(made.outputs(at.start, k, B, 0.9, 0.3, end), wanted.relu() if end else wanted)
            d = drawn(k, B, q, dtype=dtype) + t
            made.add(at.start, d)
            for c in range(k):
                rows[c].index_add_(0, local[c, at], d[c])
            close(made.rows, rows)
            if t == 1:  # others write to the rows as well
                for r in (made.rows, rows):
                    r[:2, 6] += 1
                for c in range(2):
                    made.count_all(c)
        assert torch.equal(z, before)


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("end", ["", "mask"])
def test_closing_is_a_step_of_autograd(by, end, biased, dtype):
    for p, C, B, s in ((1, 2, 1, 0), (17, 10, 3, 2), (64, 5, 4, 0), (81, 1, 5, 1)):
        a, layer = drawn(2, B, p, dtype=dtype), [drawn(3, C, p, dtype=dtype)]
        layer += [drawn(3, 1, C, dtype=dtype)] if biased else []
        y = torch.randint(C, (3, 8, 1), generator=torch.Generator().manual_seed(p))
        scale, losses = torch.full((3, 8, 1), 1 / B, dtype=dtype), torch.zeros(3, 8, 1, dtype=dtype)
        scale[1, s + B - 1] = 0  # there is no example
        factor, before = scale * 0.3, [w.clone() for w in layer]
        given = y, scale, factor, losses
        found = by.closing(a, (layer[0], layer[1] if biased else None), given, s, 0.9, end)
        for k in range(2):
            own = [w[k].clone().requires_grad_() for w in before]
            x, label, weight = (t.clone() for t in (a[k], y[k, s : s + B, 0], factor[k, s : s + B]))
            x.requires_grad_()
            z = torch.nn.functional.linear(x, own[0], own[1][0] if biased else None)
            each = torch.nn.functional.cross_entropy(z, label, reduction="none")
            (each * weight[:, 0]).sum().backward()
            close(found[k], x.grad * (x > 0) if end else x.grad)
            for now, w in zip(layer, own, strict=True):
                close(now[k], 0.9 * w.detach() - w.grad)
            close(losses[k, s : s + B, 0], torch.where(weight[:, 0] > 0, -each.detach(), 0))
        assert all(torch.equal(now[2], w[2]) for now, w in zip(layer, before, strict=True))


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_closing_spoils_no_other_client(by, bad):
    a, weight, bias, y = drawn(2, 3, 5), drawn(2, 4, 5), drawn(2, 1, 4), torch.ones(2, 3, 1).long()
    a[0, 1, 2] = bad
    ones, losses = torch.ones(2, 3, 1), torch.zeros(2, 3, 1)
    found = by.closing(a, (weight, bias), (y, ones, ones, losses), 0, 1.0, "")
    assert not found[0, 1].isfinite().any() and not weight[0].isfinite().all()
    assert all(t[1].isfinite().all() for t in (found, weight, bias, losses))


@pytest.mark.skipif(not available(), reason="without numba no product leaves zeros out")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [*WIDTHS, 63, 65, 80, 128])
def test_sparse(q, dtype):
    for shape in ((1, 1), (1, 300), (7, 95), (40, 200)):
        x, dense, b = (
            few(*shape, dtype=dtype),
            drawn(shape[1], q, dtype=dtype),
            drawn(q, dtype=dtype),
        )
        made, kept = both()[1].sparse(x, x.numel() + 1), b.clone()
        close(made.times(dense), x @ dense)
        close(made.times(dense.T.contiguous().T, b), x @ dense + b)
        # a single row of it is no copy by itself: it is the server's bias
        assert torch.equal(b, kept)
        assert BY_TORCH.sparse(x, x.numel() + 1) is None


@pytest.mark.skipif(not available(), reason="without numba no product leaves zeros out")
def test_sparse_of_all_kinds_of_numbers():
    by = both()[1]
    dense = torch.ones(6, 3)
    assert torch.equal(by.sparse(torch.zeros(4, 6), 1).times(dense), torch.zeros(4, 3))
    assert torch.equal(by.sparse(torch.ones(4, 6), 25).times(dense), torch.full((4, 3), 6.0))
    assert by.sparse(torch.ones(4, 6), 24) is None  # not fewer than asked for
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf, -2.0, 1e-45]])
    found = by.sparse(x, 7)
    assert found.columns.tolist() == [2, 3, 4, 5] and found.values.tolist()[2:] == [-2.0, x[0, 5]]


@pytest.mark.parametrize("by", both())
@pytest.mark.parametrize(("bad", "end"), [(torch.nan, ""), (torch.inf, ""), (torch.nan, "relu")])
def test_what_is_not_finite_spoils_its_own_client_alone(by, bad, end):
    z, x, X, G, Y = (drawn(*n) for n in ((2, 2, 33), (2, 2, 9), (2, 6, 9), (2, 6, 6), (2, 6, 33)))
    Y[0, 1, 32] = x[1, 0, 8] = bad
    found = by.append(z, x, (X, G, Y), 2, 0.0, end=end)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()
    assert not found[1, 0].isfinite().any() and found[1, 1].isfinite().all()
    assert not G[1, 2, 2].isfinite() and G[0].isfinite().all()
    local = torch.tensor([[0, 1], [0, 1]])
    made = by.coefficients(z.flatten(0, 1), G[:, :2], (local + torch.tensor([[0], [2]]), local))
    made.add(0, Y[:, :2])
    found = made.outputs(0, 2, 2, end=end)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()


@pytest.mark.skipif(not available(), reason="without numba there are no loops")
def test_loops_are_for_float32_and_float64_on_a_cpu():
    assert all(type(ops.ops_for(torch.zeros(1, dtype=t))).__name__ == "Loops" for t in DTYPES)
    assert type(ops.ops_for(torch.zeros(1, dtype=torch.bfloat16))) is ops.Ops
    assert type(ops.ops_for(torch.zeros(1, device="meta"))) is ops.Ops


def test_without_numba_it_is_torch(monkeypatch):
    monkeypatch.setattr(ops, "loops", lambda module: None)
    assert type(ops.ops_for(torch.zeros(1))) is ops.Ops


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [(3, 3), (1, 11), (7,), (2 * ops.TALL + 100,)])
def test_a_product_that_all_clients_share_is_that_of_the_library(rows, biased, dtype):
    a, weight, bias = (
        drawn(*rows, 20, dtype=dtype),
        drawn(5, 20, dtype=dtype),
        drawn(5, dtype=dtype),
    )
    wanted = a @ weight.T + bias if biased else a @ weight.T
    for given in (weight, weight.T.contiguous().T):  # row by row, and column by column
        made = ops.Shared(given, bias if biased else None)
        close(made(a), wanted)
        close(made(a.transpose(0, -1).contiguous().transpose(0, -1)), wanted)
    assert made(a).shape == (*rows, 5)


@pytest.mark.parametrize("rows", [ops.LARGE // (256 * 128) - 1, ops.LARGE // (256 * 128)])
def test_only_large_products_go_to_bfloat16(rows):
    a, weight, bias = drawn(rows, 128), drawn(256, 128), drawn(256)
    found, exact = ops.Shared(weight, bias, half=True)(a), a @ weight.T + bias
    off = float((found - exact).abs().max() / exact.abs().max())
    assert (1e-4 < off < 1e-2) if ops.large(rows, weight) else off < 1e-5
    assert found.dtype == torch.float32
