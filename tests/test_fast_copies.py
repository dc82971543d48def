import pytest
import torch

from fedtorch.compiled import loops
from fedtorch.fast import copies
from fedtorch.fast.layers import Leaf, Rule

COUNTS = [5, 0, 4, 1]
WIDTHS = (1, 7, 15, 16, 17, 40, 64)


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """The loops are held to torch on processors too for which torch is as fast."""
    fast = loops(copies.LOOPS) if request.param == "compiled" else None
    monkeypatch.setattr(copies, "tiles", lambda like: fast)
    return request.param


def drawn(*shape, dtype=torch.float32):
    """Numbers of which some blocks are zeros."""
    made = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape, generator=made, dtype=dtype)
    x[1:, :2, : shape[-1] // 2] = 0
    x[0] *= torch.rand(*shape[1:], generator=made, dtype=dtype) < 0.1
    return x


def held(q, p, dtype):
    """Weights and biases of four clients, each client's in one row among other parameters."""
    row = drawn(4, 1, q * p + q + 5, dtype=dtype)[:, 0]
    weight, bias = row[:, 3 : 3 + q * p].unflatten(1, (q, p)), row[:, 3 + q * p : 3 + q * p + q]
    return weight, bias[:, None]


def close(a, b):
    exact = a.dtype == torch.float64
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_products_are_those_of_each_clients_own_weights(p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
    weight, bias = held(q, p, dtype)
    for some in (bias, None):
        z = copies.outputs(a, weight, some, COUNTS)
        back = copies.inputs(d, weight, COUNTS)
        assert z.shape == d.shape and back.shape == a.shape
        assert bool(z.isfinite().all()) and bool(back.isfinite().all())
        for k, n in enumerate(COUNTS):
            close(z[k, :n], a[k, :n] @ weight[k].T + (0 if some is None else some[k]))
            close(back[k, :n], d[k, :n] @ weight[k])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_sums_of_gradients_are_those_of_real_examples(p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype)
    for biased in (True, False):
        flat = torch.full((q * p + q + 2,), 7.0, dtype=dtype)
        weight, bias = flat[1 : 1 + q * p].view(q, p), flat[1 + q * p : 1 + q * p + q]
        write = copies.sums(d, a, COUNTS, weight, bias if biased else None)
        for k, n in enumerate(COUNTS):
            write(k)
            close(weight, d[k, :n].T @ a[k, :n])
            close(bias, d[k, :n].sum(0) if biased else torch.full((q,), 7.0, dtype=dtype))
            assert flat[0] == flat[-1] == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("q", WIDTHS)
@pytest.mark.parametrize("p", WIDTHS)
def test_norms_are_those_of_outer_products(p, q, dtype):
    a, d = drawn(4, 5, p, dtype=dtype), drawn(4, 5, q, dtype=dtype) * 1e-25
    norms = copies.sq_norms(d, a, COUNTS, 1.0)
    assert norms.dtype == torch.float64
    for k, n in enumerate(COUNTS):
        wide = torch.cat([a[k, :n], torch.ones(n, 1)], 1).double()
        outer = torch.einsum("no,ni->noi", d[k, :n].double(), wide)
        torch.testing.assert_close(norms[k, :n], outer.square().sum((1, 2)), rtol=1e-5, atol=0)


def test_what_is_not_a_number_is_no_zero(way):
    a, weight = torch.zeros(1, 2, 32), torch.ones(1, 16, 32)
    a[0, 1, 20], a[0, 0, 3] = float("nan"), float("inf")
    z = copies.outputs(a, weight, None, [2])
    assert bool(z[0, 1].isnan().all()) and bool((z[0, 0] == float("inf")).all())
    into = torch.empty(16, 32)
    copies.sums(torch.ones(1, 2, 16), a, [2], into, None)(0)
    assert bool(into[:, 20].isnan().all()) and bool(into[:, 3].isinf().all())


def test_copies_of_a_transposed_weight_lie_row_by_row():
    a, d, start = drawn(4, 5, 32), drawn(4, 5, 16), drawn(1, 32, 16)[0].T
    weight = Leaf(start, 4, Rule(0.1), None).value
    close(copies.outputs(a, weight, None, [5] * 4), a @ start.T)
    close(copies.inputs(d, weight, [5] * 4), d @ start)


@pytest.mark.parametrize("counts, loop", [([16, 16], True), ([16, 17], False), ([0, 32], True)])
def test_many_rows_are_left_to_the_library(counts, loop, way):
    a, weight = torch.zeros(2, 32, 4), torch.zeros(2, 8, 4)
    assert (copies.few(a, weight, counts) is not None) == (loop and way == "compiled")
    assert copies.few(a, weight[:, :7], counts) is None  # fewer than are taken at a time


@pytest.mark.parametrize("fits", [True, False])
def test_loops_are_for_processors_with_enough_registers_and_for_known_types(fits, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(loops(copies.LOOPS), "FITS", fits)
    assert (copies.tiles(torch.zeros(1)) is not None) == fits
    assert copies.tiles(torch.zeros(1, dtype=torch.bfloat16)) is None
    assert copies.tiles(torch.zeros(1, device="meta")) is None
    monkeypatch.setattr(copies, "loops", lambda module: None)
    assert copies.tiles(torch.zeros(1)) is None
