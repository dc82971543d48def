from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from conftest import make_clients, mlp, weights
from fedtorch import (
    Client,
    ConfigError,
    FedAvg,
    FedProx,
    Local,
    Mean,
    Median,
    Recipe,
    Robust,
    Server,
    Uniform,
)
from fedtorch.aggregation import table
from fedtorch.aggregation.robust import TrimmedMean
from fedtorch.privacy import LocalDP, SampleLevel
from fedtorch.types import Released

PLANS = {
    "sample": SampleLevel(noise_multiplier=0.5, rounds=2, insecure_seed=3),
    "local": LocalDP(noise_multiplier=0.1, rounds=2, insecure_seed=3),
}


class Point(nn.Module):
    """Two numbers, drawn to a client's own targets; one full step of rate 1 gets there."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 2)


def halves(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(1) / 2


def ends(
    points: Sequence[tuple[float, float]], aggregator: object, **engine: object
) -> list[float]:
    """Where the model stands after a round of clients that want to be at ``points``."""
    clients = [
        Client(
            f"c{9 - k}", (torch.zeros(k + 1, 1), torch.tensor([p] * (k + 1), dtype=torch.float64))
        )
        for k, p in enumerate(points)
    ]
    recipe = Recipe(loss=halves, lr=1.0, steps=1, batch_size=None, aggregator=aggregator)
    server = Server(Point(), clients, recipe, engine=Local(**engine))
    server.round()
    return server.model.w.tolist()


FIVE = [(1.0, 2.0), (1.2, 1.9), (0.9, 2.2), (1.1, 2.1), (1e6, -1e6)]


@pytest.mark.parametrize(
    "engine", [{"chunk": 1}, {"chunk": 2}, {"chunk": 5}, {"solver": "stacked"}], ids=str
)
def test_the_median_of_five_of_whom_one_lies_and_of_four(engine):
    """By hand: 0.9 1.0 1.1 1.2 1e6 and -1e6 1.9 2.0 2.1 2.2; without the liar means of the middle two."""
    assert ends(FIVE, Median(), **engine) == pytest.approx([1.1, 2.0], abs=1e-12)
    assert ends(FIVE[:4], Median(), **engine) == pytest.approx([1.05, 2.05], abs=1e-12)
    assert ends(FIVE[:1], Median(), **engine) == pytest.approx([1.0, 2.0], abs=1e-12)
    assert abs(ends(FIVE, Mean(), **engine)[0]) > 1e5


def test_columns_in_blocks_of_any_size_come_to_the_same(monkeypatch):
    values = {"a": torch.randn(6, 3, 5), "s": torch.randn(6), "none": torch.zeros(6, 0)}

    def found() -> dict[str, Tensor]:
        rows = TrimmedMean().start()
        ids = tuple("abcdef")
        rows.add(Released.received(ids, {"delta": values}, {}, torch.ones(6)))
        return rows.result({})[0]["delta"]

    whole = found()
    monkeypatch.setattr(table, "CELLS", 20)
    assert all(torch.equal(v, whole[k]) for k, v in found().items())
    assert {k: v.shape for k, v in whole.items()} == {k: v.shape[1:] for k, v in values.items()}
    numbers = sorted(values["a"][:, 1, 2].tolist())
    assert whole["a"][1, 2].item() == pytest.approx(sum(numbers[1:5]) / 4)


def update(ids: str, values: list[float], buffers: list[float] | None = None) -> Released:
    sent = {"delta": {"w": torch.tensor(values).double()[:, None]}}
    own = {} if buffers is None else {"s": torch.tensor(buffers)}
    return Released.received(tuple(ids), sent, own, torch.ones(len(ids)))


def test_a_buffer_that_a_client_did_not_send_counts_as_it_was():
    rows = Median().start()
    rows.add(update("ab", [1.0, 2.0], [5.0, 9.0]))
    rows.add(update("cde", [3.0, 4.0, 1e6]))
    sent, buffers = rows.result({"s": torch.tensor(7.0)})
    assert sent["delta"]["w"].tolist() == [3.0] and buffers["s"].item() == 7.0
    assert buffers.keys() == {"s"}


@dataclass(frozen=True, kw_only=True)
class First(Robust):
    """Whoever's id comes first, which shows the order of rows."""

    def combine(self, sent):
        return {g: {n: v[0] for n, v in s.items()} for g, s in sent.items()}


def test_a_rule_that_does_nothing_is_refused():
    class Idle(Robust):
        pass

    with pytest.raises(ConfigError, match="Idle has none of combine, across and shares"):
        Idle()


def test_rows_come_by_id_however_chunks_arrive_and_are_copies():
    late, early = update("dc", [4.0, 3.0]), update("ba", [2.0, 1.0])
    rows = First().start()
    for each in (late, early):
        rows.add(each)
        each.sent["delta"]["w"].zero_()  # what a worker overwrites with its next client
    assert rows.result({})[0]["delta"]["w"].tolist() == [1.0]


def test_a_mean_of_several_clients_is_no_row_and_rows_give_no_sum():
    rows = Median().start()
    with pytest.raises(TypeError, match="does not show"):
        rows.add(Released.received(("a", "b"), {"delta": {}}, {}, torch.ones(2), summed=True))
    with pytest.raises(TypeError, match="no sum"):
        rows.sums()


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.1)], ids=str)
def test_every_solver_comes_to_the_same_median(strategy):
    recipe = Recipe(strategy, lr=0.1, epochs=1, batch_size=8, aggregator=Median())
    engines = [
        Local(chunk=1, solver="general"),
        Local(chunk=2, solver="stacked"),
        Local(solver="fast"),
    ]
    found = []
    for engine in engines:
        server = Server(mlp(), make_clients([9, 5, 12, 7, 8]), recipe, engine=engine, seed=2)
        figures = [*server.rounds(2)][-1]
        server.close()
        assert "cosine_to_mean" not in figures and figures["update_norm"] > 0
        assert "median keeps every client's update" in " ".join(server.notes)
        found.append(weights(server.model))
    for other in found[1:]:
        assert all(torch.allclose(v, found[0][k], atol=1e-6) for k, v in other.items())
    assert not torch.equal(found[0]["0.weight"], weights(mlp())["0.weight"])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_median_of_what_is_noised_already_moves_the_model(plan):
    recipe = Recipe(privacy=plan, aggregator=Median())
    server = Server(mlp(), make_clients([20, 30, 25]), recipe)
    before = weights(server.model)
    server.round()
    assert not torch.equal(before["0.weight"], server.model.state_dict()["0.weight"])
    assert server.private.spent() > 0


def test_batchnorm_statistics_go_through_the_rule_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=1.0), nn.Linear(3, 2))
    places = [0.0, 1.0, 2.0, 3.0, 1e6]  # one client's data are far off
    data = [(torch.randn(8, 3) + p, torch.zeros(8, dtype=torch.long)) for p in places]
    recipe = Recipe(epochs=1, batch_size=None, aggregator=Median())
    server = Server(model, [Client(f"c{k}", d) for k, d in enumerate(data)], recipe)
    server.round()
    # each client's statistic is the mean of its only batch
    means = torch.stack([x.mean(0) for x, _ in data])
    assert torch.allclose(model[0].running_mean, means.median(0).values, atol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Trimmed(Robust):
    """Without so many at each end, whom it counts by itself."""

    trim: int = 2

    def combine(self, sent):
        cut = slice(self.trim, -self.trim)
        return {
            g: {n: v.sort(0).values[cut].mean(0) for n, v in s.items()} for g, s in sent.items()
        }


def test_a_rule_of_ones_own_that_leaves_nobody_is_refused_by_name():
    who, recipe = make_clients([5] * 5), Recipe(aggregator=Trimmed())
    assert Server(mlp(), who, recipe).round()["step_norm"] > 0
    with pytest.raises(ConfigError, match="aggregator trimmed makes no number of 4 finite updates"):
        Server(mlp(), who[:4], recipe)
    with pytest.raises(ConfigError, match="no number of 3 finite"):
        Server(mlp(), who, recipe, participation=Uniform(cohort_size=3))
