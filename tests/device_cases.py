"""The fast path on an accelerator, as far as a machine without one can tell (``pretend``)."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import pretend
from fedtorch import (
    Client,
    ClientOptimizer,
    ConfigError,
    FedAvg,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    evaluate,
)
from fedtorch.fast.trial import offer
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.training import losses
from fedtorch.training.local_update import local_update
from fedtorch.training.module import snapshot
from fedtorch.types import Task

SIZES = [37, 18, 5]


@pytest.fixture(scope="module", autouse=True)
def registered():
    pretend.register()


def clients():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 30, generator=g), torch.randint(0, 4, (60,), generator=g)
    x[:, ::3] = 0  # columns that stay out of products
    return [
        Client(str(k), part)
        for k, part in enumerate(zip(x.split(SIZES), y.split(SIZES), strict=True))
    ]


def mlp():
    return nn.Sequential(
        nn.Linear(30, 25), nn.ReLU(), nn.Linear(25, 20), nn.Tanh(), nn.Linear(20, 4)
    )


def cnn():
    return nn.Sequential(
        nn.Unflatten(1, (1, 5, 6)), nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def sgd(**args):
    return {"optimizer": ClientOptimizer(args=args)}


def sample(**more):
    plan = {"noise_multiplier": 1.0, "rounds": 3, "sample_rate": 0.2, "steps": 3, "batch_size": 4}
    return {"privacy": SampleLevel(**plan, **more, insecure_seed=1)}


CASES = {
    "plain": (mlp, {}),
    "squared error": (
        mlp,
        {"loss": lambda z, y: (z - nn.functional.one_hot(y, 4)).square().sum(1)},
    ),
    "FedProx": (mlp, {"strategy": FedProx(mu=0.5)}),
    "SCAFFOLD": (mlp, {"strategy": Scaffold()}),
    "momentum": (mlp, sgd(momentum=0.9)),
    "decay": (mlp, sgd(weight_decay=0.1)),
    "client-level": (mlp, {"privacy": ClientLevel(noise_multiplier=1.0, rounds=3)}),
    "sample-level": (mlp, sample()),
    "projected": (mlp, sample(projected=True)),
    "convolutions": (cnn, {}),
    "private convolutions": (cnn, sample()),
}


@pytest.mark.parametrize("case", CASES)
def test_a_visit_there_is_a_visit_here(case):
    make, options = CASES[case]
    torch.manual_seed(0)
    model, recipe = make(), Recipe(lr=0.1, batch_size=8, epochs=2, **options)
    solver = offer(model, [c.data for c in clients()], recipe, recipe.privacy)
    state = snapshot(model)
    extras = recipe.strategy.init({k: state[k] for k, _ in model.named_parameters()})
    task = Task(state, extras, 0, 3, 0.1, {"clip": 1.0, "noise": 1.0} if recipe.privacy else {})
    here, _ = local_update(clients(), task, recipe, model, copy.deepcopy(solver))
    with pretend.device() as device:
        away = copy.deepcopy(model).to(device)
        there, failures = local_update(clients(), task, recipe, away, copy.deepcopy(solver))
        assert not failures
        for group, names in here.sent.items():
            for name, v in names.items():
                found = there.sent[group][name]
                assert isinstance(found, pretend.Far)
                torch.testing.assert_close(pretend.near(found), v, rtol=1e-5, atol=1e-6)
    for name, v in here.metrics.items():  # figures are for the server
        torch.testing.assert_close(there.metrics[name], v, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver", ["auto", "general", "stacked"])
@pytest.mark.parametrize("case", ["plain", "convolutions", "sample-level"])
def test_a_run_there_is_a_run_here(case, solver):
    make, options = CASES[case]
    torch.manual_seed(0)
    model, recipe = make(), Recipe(lr=0.1, batch_size=8, **options)
    other = copy.deepcopy(model)
    here = Server(model, clients(), recipe, engine=Local(solver=solver), seed=3)
    with pretend.device() as device:
        engine = Local(device=str(device), solver=solver)
        there = Server(other, clients(), recipe, engine=engine, seed=3)
        if solver == "auto":
            assert any(note.startswith("fast path") for note in there.notes)
        [*there.rounds(2)]
    [*here.rounds(2)]
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert b.device.type == "cpu"  # the server's own model stays where it was
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


def test_the_device_is_told_from_the_cpu():
    with pretend.device() as device:
        x = torch.ones(3, 2).to(device)
        assert x.device.type == "pretend" and (x + x).device == device
        assert torch.zeros(2, device=device).device == device and x.cpu().device.type == "cpu"
        assert float(x.sum() * torch.tensor(2.0)) == 12
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3, 2)
        # an index may come from the CPU, and not the other way
        assert (x[torch.tensor([2, 0])] == 1).all()
        with pytest.raises(RuntimeError, match="an index"):
            torch.ones(3)[torch.tensor([2, 0]).to(device)]
        with pytest.raises(RuntimeError, match="a generator"):
            x.bernoulli_(0.5, generator=torch.Generator())
        with pytest.raises((RuntimeError, TypeError)):
            x.numpy()


@pytest.mark.parametrize("solver", ["auto", "stacked", "general"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"strategy": Scaffold()},
        {"strategy": FedProx(mu=0.1), **sgd(momentum=0.9)},
        {"privacy": ClientLevel(noise_multiplier=1e-9, rounds=2)},
        {"loss": nn.CrossEntropyLoss()},
    ],
    ids=["plain", "scaffold", "prox", "client", "whole"],
)
def test_a_device_without_float64_trains_the_same(solver, more):
    models = []
    for narrow in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(30, 8), nn.BatchNorm1d(8) if not more else nn.ReLU(), nn.Linear(8, 4)
        )
        models.append(model)
        with pretend.device(narrow) if narrow else nullcontext() as device:
            engine = Local(solver=solver, device=str(device) if device else "cpu")
            server = Server(model, clients(), Recipe(batch_size=16, **more), engine=engine)
            server.round(), server.round()
            assert len(server.visits.ids) == 3
    for (k, a), b in zip(snapshot(models[0]).items(), snapshot(models[1]).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=k)


def test_sample_level_privacy_is_refused_without_float64():
    with pretend.device(narrow=True) as device, pytest.raises(ConfigError, match="needs float64"):
        Server(mlp(), clients(), Recipe(**sample()), engine=Local(device=str(device)))


@pytest.mark.parametrize("solver", ["auto", "stacked", "general"])
@pytest.mark.parametrize("there", [True, False])
def test_a_model_that_is_on_a_device_already_trains(solver, there):
    with pretend.device() as device:
        model = mlp().to(device)
        engine = Local(solver=solver, device=str(device) if there else "cpu")
        adam = Recipe(strategy=FedAvg(server=ServerAdam()))
        server = Server(model, clients(), adam, engine=engine)
        server.round()
        state = server.state_dict()
        assert server.round()["clients"] == 3
        assert {v.device.type for v in state["model"].values()} == {"cpu"}
        assert {p.device.type for p in model.parameters()} == {"pretend"}
        scores = evaluate(model, clients()[0].data, {"loss": losses.cross_entropy})
        assert scores["loss"] > 0
        again = Server(mlp().to(device), clients(), adam, engine=engine)
        again.load_state_dict(state)
        again.round()
        for a, b in zip(model.parameters(), again.model.parameters(), strict=True):
            assert torch.equal(pretend.near(a.data), pretend.near(b.data))
