import numpy as np
import pytest
import torch

from fedtorch.fast import ops
from fedtorch.kernels.compile import available
from loop_case import close, drawn


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr("fedtorch.fast.ops.loops", lambda module: None)
    return request.param


WIDTHS = (1, 3, 15, 16, 17, 64, 81, 200)


def places(N, n, K, T):
    """Steps of K clients with n examples each: rows of all N, and of the client's own; some twice."""
    made = torch.Generator().manual_seed(N)
    local = torch.randint(n, (K, T), generator=made)
    return local + torch.arange(K)[:, None] * n, local


@pytest.mark.parametrize("end", ["", "relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("B", [1, 3, 4])
def test_coefficients_are_added_to_and_taken_off(way, q, B, dtype, end):
    z, G = drawn(15, q, dtype=dtype), drawn(3, 5, 7, dtype=dtype)
    index, local = places(15, 5, 3, 4 * B)
    before, rows = z.clone(), torch.zeros(3, 7, q, dtype=dtype)
    made = ops.Coefficients(z, G, (index, local))
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
            made.rows[:2, 6] += 1
            rows[:2, 6] += 1
            made.count_all(2)
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", WIDTHS)
@pytest.mark.parametrize(("B", "s"), [(1, 0), (2, 0), (3, 3), (4, 8), (5, 10)])
@pytest.mark.parametrize("end", ["", "relu", "mask"])
def test_rows_are_written_down_with_their_products(way, p, B, s, end, dtype):
    x, X, G = (drawn(*size, dtype=dtype) for size in ((2, B, p), (3, 15, p), (3, 15, 15)))
    z, Y = drawn(2, B, 7, dtype=dtype), drawn(3, 15, 7, dtype=dtype)
    before, e, start = (X.clone(), G.clone()), s + B, z.clone()
    found = ops.Written(X, G, Y, 1.0)(z, x, s, 0.7 if s else 1.0, end)
    assert torch.equal(X[:2, s:e], x)
    close(G[:2, s:e, :e], x @ X[:2, :e].mT + 1)
    wanted = start * (0.7 if s else 1.0) - G[:2, s:e, :s] @ Y[:2, :s]
    close(found, {"": wanted, "relu": wanted.relu(), "mask": wanted * (Y[:2, s:e] > 0)}[end])
    for now, then in zip((X, G), before, strict=True):  # nothing else is touched
        now[:2, s:e] = then[:2, s:e] = 0
        assert torch.equal(now, then)


def test_products_with_rows_to_come_are_left_alone(way):
    x, X, G = drawn(1, 3, 20), drawn(1, 9, 20), torch.full((1, 9, 9), 7.0)
    ops.Written(X, G, drawn(1, 9, 4), 0.0)(drawn(1, 3, 4), x, 3)
    assert (G[0, 3:6, 6:] == 7).all()


def test_a_row_may_be_added_to_twice_in_a_step(way):
    made = ops.Coefficients(drawn(8, 19), drawn(2, 4, 4), (torch.zeros(2, 2).long(),) * 2)
    d = drawn(2, 2, 19)
    made.add(0, d)
    close(made.rows[:, 0], d.sum(1))
    assert not made.rows[:, 1:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
def test_weighed_rows_and_their_sum_leave_out_who_has_no_weight(way, q, dtype):
    D, weight = drawn(3, 4, q, dtype=dtype), torch.tensor([0.5, 0.0, 2.0], dtype=dtype)
    wanted = D * -weight[:, None, None]
    D[1, 2] = torch.nan
    found, total = ops.weighed(D, weight)
    close(found, wanted)
    close(total, wanted.sum((0, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", WIDTHS)
@pytest.mark.parametrize("q", WIDTHS)
def test_a_matrix_is_turned(way, p, q, dtype):
    x = drawn(p, q, dtype=dtype)
    for given in (x, x.T):
        found = ops.turned(given)
        assert torch.equal(found, given.T) and found.is_contiguous()


@pytest.mark.parametrize(("bad", "end"), [(np.nan, ""), (np.inf, ""), (np.nan, "relu")])
def test_what_is_not_finite_stays_so_and_with_its_client(way, bad, end):
    z, x, X, G, Y = (
        drawn(*size) for size in ((2, 2, 33), (2, 2, 9), (2, 6, 9), (2, 6, 6), (2, 6, 33))
    )
    Y[0, 1, 32] = bad
    x[1, 0, 8] = bad
    found = ops.Written(X, G, Y, 0.0)(z, x, 2, end=end)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()
    assert not found[1, 0].isfinite().any() and found[1, 1].isfinite().all()
    assert not G[1, 2, 2].isfinite() and G[0].isfinite().all()
    made = ops.Coefficients(z.flatten(0, 1), G[:, :2], places(4, 2, 2, 2))
    made.add(0, Y[:, :2])
    found = made.outputs(0, 2, 2, end=end)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()
    assert found[1, :, :32].isfinite().all() == G[1, :2].isfinite().all()


@pytest.mark.skipif(not available(), reason="without numba there are no loops")
def test_half_precision_and_whoever_has_no_loops_go_by_torch():
    assert ops.compiled(torch.zeros(1)) is not None
    assert ops.compiled(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert ops.compiled(torch.zeros(1, device="meta")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_norms_of_products_are_found_without_them(way, q, n, dtype):
    D, X = drawn(2, n, q, dtype=dtype), drawn(2, n, 11, dtype=dtype)
    norms = ops.spans(D, X @ X.mT)
    near = {"rtol": 1e-12 if dtype == torch.float64 else 2e-5, "atol": 0}
    wanted = (D.double().mT @ X.double()).square().sum((1, 2))
    torch.testing.assert_close(norms.double(), wanted, **near)
