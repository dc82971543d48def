"""A whole local update of the user's own: held to the same written around nothing but PyTorch."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, Adam

from conftest import make_clients, mlp, weights
from fedtorch import Client, ConfigError, FedProx, Local, Median, Recipe, Scaffold, Server, seeds
from fedtorch.engines.workers import kit
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.training.batches import batch_order
from fedtorch.training.stacked import general

SIZES = [19, 8]
ORDER: dict[str, Any] = {"lr": 0.01, "epochs": 2, "batch_size": 8}


class Gan(nn.Module):
    """A generator and what judges it; it has no forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.g = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6))
        self.d = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))


def in_turn(model: Any, batches: Any, lr: float) -> Tensor:
    """Judge and generator by turns, each with an optimizer of its own."""
    judge, maker = Adam(model.d.parameters(), lr), Adam(model.g.parameters(), lr)
    for x, _ in batches:
        fake = model.g(torch.randn(len(x), 3))
        model.d.requires_grad_(True)
        loss = F.softplus(-model.d(x)).mean() + F.softplus(model.d(fake.detach())).mean()
        judge.zero_grad()
        loss.backward()
        judge.step()
        model.d.requires_grad_(False)
        maker.zero_grad()
        F.softplus(-model.d(fake)).mean().backward()
        maker.step()
    return loss.detach()  # the judge stays frozen, which is for the visit alone


def untold(model: Any, batches: Any, lr: float) -> None:
    in_turn(model, batches, lr)


def batches_of(client: Client, round: int) -> list[tuple[Tensor, ...]]:
    order = batch_order(len(client), Recipe(**ORDER), seeds.derive(0, "order", round, client.id))
    return [tuple(t[row[row >= 0]] for t in client.data.tensors) for row in order]


@pytest.mark.parametrize("engine", [Local(), Local(chunk=1), Local(solver="general")], ids=str)
def test_rounds_are_those_written_by_hand(engine):
    """A client's draws come from torch's generator, seeded for its visit."""
    clients = make_clients(SIZES)
    server = Server(Gan(), clients, Recipe(local=in_turn, **ORDER), engine=engine)
    for round in range(2):
        total: dict[str, Tensor] = {}
        losses = []
        for client in clients:
            model = copy.deepcopy(server.model)
            with seeds.seeded(seeds.derive(0, "visit", round, client.id)):
                losses.append(float(in_turn(model, batches_of(client, round), 0.01)) * len(client))
            for k, v in model.state_dict().items():
                total[k] = total.get(k, 0) + v.double() * len(client) / sum(SIZES)
        figures = server.round()
        assert figures["train_loss"] == pytest.approx(sum(losses) / sum(SIZES), rel=1e-6)
        got = server.model.state_dict()
        assert all(torch.allclose(got[k].double(), v, rtol=0, atol=1e-6) for k, v in total.items())
    assert all(p.requires_grad and p.grad is None for p in server.session.model.parameters())


def test_what_goes_to_workers_and_a_run_that_goes_on_have_the_same_bits():
    recipe = Recipe(local=in_turn, **ORDER)
    first, later = (Server(Gan(), make_clients(SIZES), recipe) for _ in range(2))
    body, data = kit.pack(Gan(), make_clients(SIZES), recipe, general)
    sent = kit.unpack(body, data.block(), "cpu")
    there = Server(sent.model, [*sent.clients.values()], sent.recipe)
    [*first.rounds(1)]
    later.load_state_dict(first.state_dict())
    [*first.rounds(1)], [*later.rounds(1)], [*there.rounds(2)]
    ends = [weights(s.model) for s in (first, later, there)]
    assert all(torch.equal(end[k], ends[0][k]) for end in ends for k in end)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"aggregator": Median()},
        {"privacy": ClientLevel(noise_multiplier=0.01, rounds=1)},
        {"privacy": LocalDP(noise_multiplier=0.01, rounds=1)},
    ],
    ids=str,
)
def test_a_loss_that_is_not_told_is_no_figure(given):
    server = Server(Gan(), make_clients([8] * 12), Recipe(local=untold, **ORDER, **given))
    figures = server.round()
    assert server.visits.ids and not any("loss" in k for k in figures)
    assert not torch.equal(server.model.g[0].weight, Gan().g[0].weight)
    assert any("a visit is a local update of your own (local)" in n for n in server.notes)


def test_an_update_may_go_through_its_batches_again_and_ask_for_losses_within_a_step():
    def again(model: Any, batches: Any, lr: float) -> float:
        assert len(batches) == len([*batches]) == len([*batches])
        steps = LBFGS(model.parameters(), lr, line_search_fn="strong_wolfe")
        for x, y in batches:

            def closure(x: Tensor = x, y: Tensor = y) -> Any:
                steps.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss.detach()

            steps.step(closure)
        return float(closure())

    server = Server(mlp(), make_clients(SIZES), Recipe(local=again, **(ORDER | {"lr": 0.3})))
    losses = [f["train_loss"] for f in server.rounds(3)]
    assert losses[-1] < 0.1


def test_a_loss_that_is_no_number_fails_that_client_alone():
    def broken(model: Any, batches: Any, lr: float) -> float:
        nothing = len(batches) != 6  # the smaller client's visit, and the trial
        with torch.no_grad():
            model[0].weight.mul_(float("nan") if nothing else 0.5)
        return float("nan") if nothing else 1.0

    server = Server(mlp(), make_clients(SIZES), Recipe(local=broken, **ORDER))
    figures = server.round()
    assert figures["nonfinite"] == 1 and figures["train_loss"] == 1


def replaced(model: Any, batches: Any, lr: float) -> None:
    model[0] = nn.Linear(6, 12)


REFUSED = {
    "sample": (in_turn, {"privacy": SampleLevel(noise_multiplier=1.0, rounds=1)}, "nobody clips"),
    "fedprox": (in_turn, {"strategy": FedProx()}, "fedprox changes the gradients of local steps"),
    "scaffold": (in_turn, {"strategy": Scaffold()}, "scaffold changes the gradients of local"),
    "arguments": (lambda model: None, {}, "local fails .*takes 1 positional argument but 3 were"),
    "fails": (
        lambda m, b, lr: 1 / 0,
        {},
        "local fails for model Gan and two batches of 8 of client",
    ),
    "figures": (lambda m, b, lr: {"d": 1.0}, {}, "local must return the visit's loss, .*got dict"),
    "losses": (lambda m, b, lr: torch.ones(2), {}, "local must return .*a number, .*got Tensor"),
    "number": (5, {}, "local must be a function or None, got 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_training(case):
    update, given, why = REFUSED[case]
    with pytest.raises(ConfigError, match=why):
        Server(Gan(), make_clients(SIZES), Recipe(local=update, **ORDER, **given))


@pytest.mark.parametrize(
    "given",
    [
        {"loss": F.cross_entropy},
        {"step": lambda m, b: 0},
        {"optimizer": "adam"},
        {"clip_norm": 1.0},
        {"accumulate": 2},
        {"lr_warmup": 2},
        {"lr_decay": "linear"},
        {"scheduler": lambda o, n: None},
    ],
    ids=lambda given: next(iter(given)),
)
def test_options_of_steps_beside_a_local_update_are_refused_by_name(given):
    (name,) = given
    with pytest.raises(ConfigError, match=f"local takes a visit's steps itself, so {name} would"):
        Recipe(local=in_turn, **given)
    assert replace(Recipe(local=in_turn), lr=0.5).local is in_turn


def test_an_update_trains_the_model_that_it_is_given():
    model, clients = Gan(), make_clients(SIZES)
    before = weights(model)

    def outside(copy: Any, batches: Any, lr: float) -> None:
        in_turn(model, batches, lr)

    with pytest.raises(ConfigError, match=r"local trains parameter g.0.weight of the very model"):
        Server(model, clients, Recipe(local=outside, **ORDER))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ConfigError, match="local puts other parameters into the model"):
        Server(mlp(), clients, Recipe(local=replaced, **ORDER))
    for solver in ("fast", "stacked"):
        with pytest.raises(ConfigError, match=f"solver {solver} cannot train this: .*of your own"):
            Server(Gan(), clients, Recipe(local=in_turn, **ORDER), engine=Local(solver=solver))


def test_statistics_of_the_data_are_refused_under_a_plan_for_clients():
    def counted(model: Any, batches: Any, lr: float) -> None:
        for x, _ in batches:
            model.seen += x.mean()

    plan, model = ClientLevel(noise_multiplier=0.1, rounds=1), Gan()
    model.register_buffer("seen", torch.zeros(()))
    Server(model, make_clients(SIZES), Recipe(local=counted, **ORDER)).round()
    with pytest.raises(ConfigError, match="buffer seen changes while training and nobody noises"):
        Server(model, make_clients(SIZES), Recipe(local=counted, **ORDER, privacy=plan))


class OwnsOptimizer(nn.Module):
    """A model that keeps its optimizer, as trainers of one's own do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 10)
        self.optimizer = torch.optim.Adam(self.parameters(), 0.1)

    def forward(self, x):
        return self.layer(x)


def by_its_own(model, batches, lr):
    for x, y in batches:
        model.optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model.optimizer.step()


def test_what_a_models_own_optimizer_remembers_goes_to_no_other_client():
    clients, found = make_clients([9, 7, 8]), []
    for order in (clients, clients[::-1]):
        torch.manual_seed(0)
        model = OwnsOptimizer()
        server = Server(model, order, Recipe(local=by_its_own, batch_size=None))
        server.round()
        assert not model.optimizer.state  # clients train copies, and their trials leave nothing
        assert any("attribute optimizer of layer the model" in n for n in server.notes)
        found.append(model.layer.weight.detach().clone())
    assert torch.allclose(*found, rtol=0, atol=1e-6)
