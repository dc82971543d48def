import torch

from fedtorch.aggregation.mean import RunningMean
from fedtorch.types import Released


def update(ids: str, values: list[float], weight: list[float], moved: bool = True) -> Released:
    v = torch.tensor(values, dtype=torch.float64)[:, None]
    buffers = {"s": v.float()} if moved else {}
    return Released.received(tuple(ids), {"delta": {"w": v}}, buffers, torch.tensor(weight))


def test_mean_is_weighted_and_does_not_depend_on_how_clients_are_chunked():
    values, weight = [1.0, 5.0, 9.0], [1.0, 2.0, 5.0]
    whole, parts = RunningMean(), RunningMean()
    whole.add(update("abc", values, weight))
    parts.add(update("b", values[1:2], weight[1:2]))
    parts.add(update("ac", values[::2], weight[::2]))
    want = (1 * 1 + 2 * 5 + 5 * 9) / 8
    for mean in (whole, parts):
        sent, buffers = mean.result()
        assert sent["delta"]["w"].item() == want
        assert buffers["s"].item() == want


def test_ten_thousand_small_updates_lose_nothing():
    mean = RunningMean()
    for _ in range(10_000):
        mean.add(update("a", [0.1], [1.0]))
    assert abs(mean.result()[0]["delta"]["w"].item() - 0.1) < 1e-12


def test_a_summed_update_alone_and_among_others():
    """The mean of 1.0 and 5.0 by 1 and 3 arrives as one row."""
    row = torch.tensor([[4.0]], dtype=torch.float64)
    one = Released.received(
        ("a", "b"), {"delta": {"w": row}}, {}, torch.tensor([1.0, 3.0]), summed=True
    )
    mean = RunningMean()
    mean.add(one)
    assert mean.result()[0]["delta"]["w"].item() == 4
    assert mean.sums()["delta"]["w"].item() == 16
    assert mean.result()[0]["delta"]["w"].item() == 4
    mean.add(one)
    mean.add(update("c", [12.0], [8.0]))
    assert mean.weight == 16
    sent, buffers = mean.result({"s": torch.tensor([2.0])})
    assert (
        sent["delta"]["w"].item() == (16 + 16 + 96) / 16 and buffers["s"].item() == (16 + 96) / 16
    )
    assert row.item() == 4


def test_a_buffer_that_a_client_did_not_send_counts_with_its_start_value():
    mean = RunningMean()
    mean.add(update("a", [3.0], [1.0]))
    mean.add(update("bc", [1.0, 1.0], [2.0, 5.0], moved=False))
    _, buffers = mean.result({"s": torch.tensor([11.0]), "other": torch.zeros(1)})
    assert buffers["s"].item() == (1 * 3 + 7 * 11) / 8 and set(buffers) == {"s"}
