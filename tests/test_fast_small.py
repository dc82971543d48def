import numpy as np
import pytest
import torch

from fedtorch.fast import small


@pytest.fixture(params=["compiled", "torch"])
def way(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr("fedtorch.fast.small.loops", lambda module: None)
    return request.param


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def close(a, b):
    exact = a.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if exact else 2e-5 * b.abs().max().item())


WIDTHS = (1, 3, 15, 16, 17, 64, 81, 200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize(("B", "s", "n"), [(1, 0, 1), (3, 4, 4), (4, 8, 7), (5, 10, 12)])
def test_a_product_is_taken_off(way, q, B, s, n, dtype):
    z, G, Y = (drawn(*size, dtype=dtype) for size in ((3, 15, q), (3, 15, n), (3, n, q)))
    before, a = z.clone(), torch.zeros(2, B)
    for begin in (0, s):
        found = small.subtract(z, begin, a, G, Y, s)
        close(found, z[:2, begin : begin + B] - G[:2, s : s + B] @ Y[:2])
    assert torch.equal(z, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", WIDTHS)
@pytest.mark.parametrize(("B", "s"), [(1, 0), (2, 0), (3, 3), (4, 8), (5, 10)])
def test_rows_are_written_down_with_their_products(way, p, B, s, dtype):
    x, X, G = (drawn(*size, dtype=dtype) for size in ((2, B, p), (3, 15, p), (3, 15, 15)))
    z, Y = drawn(2, B, 7, dtype=dtype), drawn(3, 15, 7, dtype=dtype)
    before, e, start = (X.clone(), G.clone()), s + B, z.clone()
    found = small.corrected(z, x, X, G, Y, s, 1.0)
    assert torch.equal(X[:2, s:e], x)
    close(G[:2, s:e, :e], x @ X[:2, :e].mT + 1)
    close(found, start - G[:2, s:e, :s] @ Y[:2, :s])
    for now, then in zip((X, G), before, strict=True):  # nothing else is touched
        now[:2, s:e] = then[:2, s:e] = 0
        assert torch.equal(now, then)


def test_products_with_rows_to_come_are_left_alone(way):
    x, X, G = drawn(1, 3, 20), drawn(1, 9, 20), torch.full((1, 9, 9), 7.0)
    small.corrected(drawn(1, 3, 4), x, X, G, drawn(1, 9, 4), 3, 0.0)
    assert (G[0, 3:6, 6:] == 7).all()


def test_rows_are_added_where_they_belong_also_twice(way):
    place = torch.tensor([[0, 1, 3, 1], [4, 6, 6, 5]])
    D, d = torch.ones(2, 4, 19), drawn(2, 2, 19)
    small.add_rows(D, place, 2, d)
    expected = torch.ones(8, 19)
    for c in range(2):
        for i in range(2):
            expected[place[c, 2 + i]] += d[c, i]
    close(D.flatten(0, 1), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_and_with_its_client(way, bad):
    z, x, X, G, Y = (
        drawn(*size) for size in ((2, 2, 33), (2, 2, 9), (2, 6, 9), (2, 6, 6), (2, 6, 33))
    )
    Y[0, 1, 32] = bad
    x[1, 0, 8] = bad
    found = small.corrected(z, x, X, G, Y, 2, 0.0)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()
    assert not found[1, 0].isfinite().any() and found[1, 1].isfinite().all()
    assert not G[1, 2, 2].isfinite() and G[0].isfinite().all()
    found = small.subtract(z[:1], 0, torch.zeros(1, 2), G[:1], Y[:1], 2)
    assert not found[0, :, 32].isfinite().any() and found[0, :, :32].isfinite().all()


def test_half_precision_and_whoever_has_no_loops_go_by_torch():
    assert small.compiled(torch.zeros(1)) is not None
    assert small.compiled(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert small.compiled(torch.zeros(1, device="meta")) is None


@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_products_of_each_two_rows_are_taken_once(way, q, n):
    D = drawn(2, n, q)
    close(small.pairs(D), (D @ D.mT).tril())
