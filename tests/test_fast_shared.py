import pytest
import torch

from fedtorch.fast import ops, shared
from fedtorch.kernels.compile import available, loops
from loop_case import close, drawn


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def way(request, monkeypatch):
    """The loops are held to torch on processors too for which torch is as fast."""
    fast = loops(ops.TILES) if request.param == "compiled" else None
    for module in (shared, ops):
        monkeypatch.setattr(module, "tiles", lambda like: fast)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("q", [1, 15, 16, 17, 40, 64])
@pytest.mark.parametrize("p", [1, 16, 33])
@pytest.mark.parametrize("rows", [(3, 3), (2, 5), (1, 11), (3, 10), (7,)])
def test_a_product_is_that_of_the_library(rows, p, q, biased, dtype):
    a, weight, bias = drawn(*rows, p, dtype=dtype), drawn(q, p, dtype=dtype), drawn(q, dtype=dtype)
    wanted = a @ weight.T + bias if biased else a @ weight.T
    for given in (weight, weight.T.contiguous().T):  # row by row, and column by column
        made = shared.Shared(given, bias if biased else None)
        close(made(a), wanted)
        close(made(a.transpose(0, -1).contiguous().transpose(0, -1)), wanted)
    assert made(a).shape == (*rows, q)


def test_a_product_of_thousands_of_rows_is_taken_in_parts():
    a, weight, bias = drawn(1300, 20), drawn(5, 20), drawn(5)
    close(shared.Shared(weight, bias)(a), a @ weight.T + bias)
    close(shared.Shared(weight, None)(a), a @ weight.T)


@pytest.mark.parametrize("rows", [shared.LARGE // (256 * 128) - 1, shared.LARGE // (256 * 128)])
def test_only_large_products_go_to_bfloat16(rows):
    a, weight, bias = drawn(rows, 128), drawn(256, 128), drawn(256)
    found, exact = shared.Shared(weight, bias, half=True)(a), a @ weight.T + bias
    off = float((found - exact).abs().max() / exact.abs().max())
    coarse = rows * weight.numel() >= shared.LARGE
    assert (1e-4 < off < 1e-2) if coarse else off < 1e-5
    assert found.dtype == torch.float32


def test_what_is_not_finite_stays_in_its_row_and_column():
    a, weight = drawn(12, 20), drawn(18, 20)
    a[3, 4], weight[17, 0] = torch.nan, torch.inf
    found = shared.Shared(weight, None)(a)
    assert found[3].isnan().all() and not found[:, 17].isfinite().any()
    found[3], found[:, 17] = 0, 0
    assert found.isfinite().all()


def test_large_products_are_left_to_several_threads_where_there_are_any(way, monkeypatch):
    made, called = shared.Shared(drawn(40, 64), None), []
    monkeypatch.setattr(
        made, "_by_library", lambda rows: called.append(rows) or rows @ made.weight.T
    )
    for threads, large in ((1, 0), (2, 0), (2, 1 << 20)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(shared, "LARGE", large)
        close(made(drawn(20, 64)), drawn(20, 64) @ made.weight.T)
    assert len(called) == (1 if way == "compiled" and available() else 3)
