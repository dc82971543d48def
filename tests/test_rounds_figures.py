"""The figures of a round against their definitions, worked out the long way."""

import pytest
import torch
from torch import nn

from conftest import watched
from fedtorch import Client, FedAvg, Local, Recipe, Scaffold, Server
from fedtorch.privacy import SampleLevel
from fedtorch.rounds.figures import norm, spread, traffic
from fedtorch.rounds.participation import Everyone
from fedtorch.types import Task


def clients(sizes: list[int]) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(f"c{k}", (torch.randn(n, 6, generator=g), torch.randint(0, 4, (n,), generator=g)))
        for k, n in enumerate(sizes)
    ]


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def test_spread_of_a_known_list():
    found = spread("x", torch.arange(1.0, 22.0))
    assert found == {
        "x_min": 1, "x_q1": 6, "x_median": 11, "x_q3": 16, "x_max": 21, "x_worst10": 20,
    }  # fmt: skip
    assert spread("x", torch.tensor([3.0]))["x_worst10"] == 3
    uneven = torch.tensor([0.3, 7.0, -2.0, 1.5], dtype=torch.float64)
    assert spread("x", uneven)["x_q1"] == pytest.approx(float(uneven.quantile(0.25)))
    assert spread("x", torch.tensor([1.0, 2.0, torch.inf]))["x_median"] == 2


@pytest.mark.parametrize("chunk", [1, 3])
def test_cosine_to_mean_is_the_average_over_clients_by_weight_and_length(chunk):
    each = Server(model(), clients([8, 20, 13]), engine=Local(chunk=1, solver="general"))
    seen = watched(each)
    each.round()
    engine = Local(chunk=chunk, solver="stacked" if chunk > 1 else "general")
    server = Server(model(), clients([8, 20, 13]), Recipe(), engine=engine)
    figures = server.round()
    flat = torch.cat([torch.cat([v.flatten(1) for v in u.sent["delta"].values()], 1) for u in seen])
    weight = torch.cat([u.weight for u in seen]).double()
    mean = (weight[:, None] * flat).sum(0) / weight.sum()
    cosines = torch.cosine_similarity(flat, mean[None])
    by = weight * flat.norm(dim=1)
    assert figures["cosine_to_mean"] == pytest.approx(float((cosines * by).sum() / by.sum()))
    assert figures["update_norm"] == pytest.approx(float((weight * flat.norm(dim=1)).sum() / 41))
    assert figures["step_norm"] == pytest.approx(float(mean.norm()))
    loss = server.visits.values["train_loss"]
    assert figures["train_loss"] == pytest.approx(float((loss * weight).sum() / 41))
    assert figures["client_loss_max"] == pytest.approx(float(loss.max()))


def test_one_client_alone_agrees_with_the_mean():
    assert Server(model(), clients([9])).round()["cosine_to_mean"] == pytest.approx(1.0)


def test_bytes_count_what_each_side_sends():
    size = 4 * (6 * 5 + 5 + 5 * 4 + 4)
    plain = Server(model(), clients([8, 8]), Recipe(FedAvg())).round()
    assert (plain["bytes_down"], plain["bytes_up"]) == (2 * size, 2 * size)
    control = Server(model(), clients([8, 8]), Recipe(Scaffold())).round()
    assert (control["bytes_down"], control["bytes_up"]) == (4 * size, 4 * size)
    lossy = Server(model(), clients([8] * 20), participation=Everyone(dropout=0.5)).round()
    assert lossy["dropped"] > 0
    assert lossy["bytes_down"] == 20 * size
    assert lossy["bytes_up"] == (20 - lossy["dropped"]) * size


def test_bytes_of_buffers():
    state = {
        "w": torch.zeros(3),
        "mean": torch.zeros(2),
        "count": torch.zeros((), dtype=torch.int64),
    }
    task = Task(state, {}, 0, 0, 0.1)
    sent = {"delta": {"w": torch.zeros(3).double()}, "buffers": {"mean": torch.zeros(2)}}
    found = traffic(task, state, sent, asked=2, reported=1)
    assert found == {"bytes_down": 2 * (12 + 8 + 8), "bytes_up": 12 + 8}


def test_bytes_of_frozen_weights_and_constants_are_in_no_round():
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))
    net[0].requires_grad_(False)
    net.register_buffer("mask", torch.full((100,), -torch.inf))
    head, norm = 4 * (10 + 24), 4 * 10
    server = Server(net, clients([8, 8]), Recipe(batch_size=8))
    for figures in server.rounds(2):
        assert (figures["bytes_down"], figures["bytes_up"]) == (
            2 * (head + norm),
            2 * (head + norm),
        )
    net[1].eval()  # a part that its owner froze keeps its statistics
    figures = Server(net, clients([8, 8]), Recipe(batch_size=8)).round()
    assert (figures["bytes_down"], figures["bytes_up"]) == (2 * head, 2 * head)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    net[0].requires_grad_(False)
    net.register_buffer("scale", torch.ones(3))
    plan = SampleLevel(noise_multiplier=1.0, rounds=1)
    figures = Server(net, clients([8, 8]), Recipe(privacy=plan)).round()
    assert figures["bytes_down"] == figures["bytes_up"] == 2 * 4 * 24


def test_a_round_without_clients_has_no_client_figures():
    server = Server(model(), clients([8]), participation=Everyone(dropout=0.999999))
    figures = server.round()
    assert figures["clients"] == 0 and figures["step_norm"] == 0 == norm({})
    assert "train_loss" not in figures and figures["examples_per_second"] == 0


def test_examples_per_second_counts_every_pass():
    server = Server(model(), clients([10, 7]), Recipe(epochs=3, batch_size=4))
    server.round()
    assert float(server.visits.values["visited"].sum()) == 3 * 17


@pytest.mark.parametrize(
    "value",
    [
        torch.full((8_000_000,), 1.2345e-3),
        torch.full((3, 1000), 1e-4, dtype=torch.float16),
        torch.full((7,), 300.0, dtype=torch.float16),
        torch.full((100_000,), 0.7, dtype=torch.bfloat16),
        torch.full((5,), 1e30),
        torch.full((5,), 1e-30),
        torch.tensor([200, 100], dtype=torch.uint8),
        torch.tensor(3.0),
        torch.tensor([True, False]),
    ],
    ids=lambda v: f"{v.dtype}-{v.numel()}",
)
def test_length_keeps_its_digits_in_every_type_and_size(value):
    exact = float(value.double().square().sum().sqrt())
    assert norm({"a": value, "b": torch.zeros(0)}) == pytest.approx(exact, rel=1e-5, abs=0)
