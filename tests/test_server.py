import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, watched, weights
from fedtorch import (
    Client,
    ConfigError,
    Everyone,
    FedAvg,
    Local,
    Observer,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    ServerSGD,
    evaluate,
)
from fedtorch.privacy import ClientLevel, LocalDP
from fedtorch.run.console import Report
from fedtorch.training.optimizer import ServerOptimizer
from fedtorch.types import Released


def test_the_model_is_trained_in_place_and_stays_a_plain_module():
    model = mlp()
    server = Server(model, make_clients([30, 20]), Recipe(lr=0.3, epochs=3))
    losses = [figures["train_loss"] for figures in server.rounds(5)]
    assert losses[-1] < losses[0]
    assert server.model is model
    assert type(model) is nn.Sequential
    assert all(p.grad is None for p in model.parameters())


class Shaken(FedAvg):
    """Draws as it begins and as it steps."""

    def init(self, params):
        return {"c": {k: torch.rand_like(v) for k, v in params.items()}}

    def step(self, mean, extras, share):
        return {k: v + 0.01 * torch.randn_like(v) for k, v in mean["delta"].items()}, extras


def test_what_a_strategy_draws_is_the_seeds_to_decide():
    def server(rounds, state=None):
        made = Server(mlp(), make_clients([30, 20]), Recipe(Shaken()), seed=5)
        if state:
            made.load_state_dict(state)
        torch.rand(7)  # others draw meanwhile
        return made, [*made.rounds(rounds)]

    whole, part = server(3)[0], server(1)[0]
    resumed = server(2, copy.deepcopy(part.state_dict()))[0]
    mine, again = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(mine[k], again[k]) for k in mine)


def test_figures_of_a_round():
    figures = Server(mlp(), make_clients([30, 10]), Recipe(), participation=Everyone()).round()
    assert figures["round"] == 1
    assert figures["clients"] == 2
    assert sorted(figures["cohort"]) == ["c0", "c1"]
    assert figures["failed"] == {}
    assert figures["examples"] == 40
    assert figures["update_norm"] > 0


def test_a_client_that_becomes_nan_is_named_and_left_out_and_the_model_stays_finite():
    clients = make_clients([30, 10])
    x, y = clients[1].data.tensors
    clients.append(Client("bad", (x * float("nan"), y)))
    alone = mlp()
    Server(alone, clients[:2], Recipe(Scaffold())).round()
    for chunk in (1, 3):
        model = mlp()
        server = Server(model, clients, Recipe(Scaffold()), engine=Local(chunk=chunk))
        figures = server.round()
        assert figures["failed"] == {"bad": "nonfinite"}
        assert sorted(figures["cohort"]) == ["c0", "c1"]
        for k, v in weights(model).items():
            assert v.isfinite().all()
            assert torch.allclose(v, alone.state_dict()[k], atol=1e-6)


def test_when_every_client_is_nan_the_model_stays_as_it_was():
    (client,) = make_clients([10])
    x, y = client.data.tensors
    model = mlp()
    before = weights(model)
    figures = Server(model, [Client("bad", (x * float("nan"), y))], Recipe()).round()
    assert figures["failed"] == {"bad": "nonfinite"}
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())


class Spike(ServerOptimizer):
    """A server optimizer whose second step is as bad as it can be."""

    def __init__(self, optimizer, where):
        vars(self).update(optimizer=optimizer, where=where, steps=0, init=optimizer.init)

    def step(self, delta, state):
        vars(self)["steps"] += 1
        if self.steps == 2 and self.where == "step":
            return {k: v * float("inf") for k, v in delta.items()}, state
        if self.steps == 2:  # squares overflow in the moments, and the step itself is 0
            delta = {k: torch.full_like(v, 1e200) for k, v in delta.items()}
        return self.optimizer.step(delta, state)

    def step_from(self, params, delta, state):
        return self.step(delta, state)


@pytest.mark.parametrize("where", ["step", "moments"])
def test_a_step_that_is_not_finite_is_a_failed_round_and_not_the_end(where, capsys):
    model = mlp()
    server = Server(model, make_clients([10]), Recipe(FedAvg(server=Spike(ServerAdam(), where))))
    assert "step_failed" not in server.round()
    before, kept = weights(model), copy.deepcopy(server.state.optimizer)
    figures = server.round()
    assert figures["step_failed"] and figures["step_norm"] == 0 and figures["round"] == 2
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    for group, tree in kept.items():
        assert all(torch.equal(server.state.optimizer[group][k], v) for k, v in tree.items())
    with Report(3, 0) as report:
        report.round(figures)
    assert "round 2: failed, the server's step is not finite" in capsys.readouterr().out
    figures = server.round()
    assert "step_failed" not in figures and figures["step_norm"] > 0


@pytest.mark.parametrize(
    "strategy", [FedAvg(), FedAvg(server=ServerAdam()), Scaffold(server=ServerSGD(momentum=0.9))]
)
def test_state_goes_out_and_comes_back_bit_for_bit(strategy):
    def server() -> Server:
        return Server(mlp(), make_clients([12, 5, 9]), Recipe(strategy, batch_size=4), seed=5)

    whole, first, second = server(), server(), server()
    for _ in whole.rounds(5):
        pass
    for _ in first.rounds(2):
        pass
    second.load_state_dict(first.state_dict())
    for _ in second.rounds(3):
        pass
    a, b = weights(whole.model), weights(second.model)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_of_frozen_weights_a_state_has_the_digest_alone():
    def server(seed: int = 1) -> Server:
        model = mlp()
        torch.manual_seed(seed)
        nn.init.normal_(model[0].weight).requires_grad_(False)
        return Server(model, make_clients([12, 5]), Recipe(batch_size=4), seed=5)

    whole, first, second = server(), server(), server()
    assert len([*whole.rounds(4)]) == len([*first.rounds(2)]) + 2
    state = first.state_dict()
    assert {*state["model"]} == {"0.bias", "2.weight", "2.bias"}
    second.load_state_dict(state)
    assert len([*second.rounds(2)]) == 2
    a, b = weights(whole.model), weights(second.model)
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(
        ConfigError, match=r"its frozen weights or constants are not these; make the"
    ):
        server(seed=2).load_state_dict(state)
    complete = {k: v for k, v in state.items() if k != "base"} | {"model": a}
    other = server(seed=2)
    other.load_state_dict(complete)  # as earlier versions wrote it
    assert torch.equal(other.model[0].weight, a["0.weight"])


def test_state_of_another_model_is_refused():
    other = Server(mlp(classes=7), make_clients([12]), Recipe()).state_dict()
    with pytest.raises(ConfigError, match="checkpoint is of another model"):
        Server(mlp(), make_clients([12]), Recipe()).load_state_dict(other)


def test_state_without_its_parts_is_refused():
    server = Server(mlp(), make_clients([12]), Recipe())
    with pytest.raises(ConfigError, match="checkpoint has no 'seed'"):
        server.load_state_dict({"round": 3})


@pytest.mark.parametrize(
    "ids, message",
    [([], "there are no clients"), (["a", "b", "a"], "'a' is there twice")],
)
def test_clients_that_cannot_be_told_apart_are_refused(ids, message):
    clients = [Client(i, (torch.zeros(4, 6), torch.zeros(4).long())) for i in ids]
    with pytest.raises(ConfigError, match=message):
        Server(mlp(), clients)


def batchnorm() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))


def test_buffer_policy_float_statistics_averaged_integer_counters_kept():
    """One full-batch step a client: running statistics can be computed by hand."""
    model, start, clients = batchnorm(), batchnorm(), make_clients([8, 24])
    recipe = Recipe(batch_size=None, epochs=1, lr=0.1)
    Server(model, clients, recipe).round()
    with torch.no_grad():
        seen = [start[0](c.data.tensors[0]) for c in clients]
    share = (8 / 32, 24 / 32)
    mean = sum(p * 0.1 * h.mean(0) for p, h in zip(share, seen, strict=True))
    var = sum(p * (0.9 + 0.1 * h.var(0)) for p, h in zip(share, seen, strict=True))
    assert torch.allclose(model[1].running_mean, mean, atol=1e-6)
    assert torch.allclose(model[1].running_var, var, atol=1e-6)
    assert model[1].num_batches_tracked == 0


def test_frozen_parameters_stay_and_tied_ones_stay_tied():
    model = mlp()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    Server(model, make_clients([10, 20]), Recipe(Scaffold(), lr=0.5)).round()
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[2].weight, before["2.weight"])

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    for chunk in (1, 2):
        tied = Tied()
        Server(tied, make_clients([10, 20]), Recipe(lr=0.5), engine=Local(chunk=chunk)).round()
        assert tied.a.weight is tied.b.weight


def test_fit_gives_the_history_and_keeps_quiet_when_piped(capsys):
    server = Server(mlp(), make_clients([12, 5]), Recipe())
    history = server.fit(3)
    assert [m["round"] for m in history] == [1, 2, 3] == list(range(1, server.round_number + 1))
    assert [m["round"] for m in server.fit(1, progress=False)] == [4]
    assert capsys.readouterr().out == ""
    assert history.column("train_loss")[0][0] == 1


LATER = [
    "aggregation.rows",
    "channel.topk",
    "data.base",
    "engines.workers",
    "privacy.accounting.bounds",
]
LATER += [
    "privacy.one_client",
    "privacy.sample",
    "rounds.attacks",
    "rounds.buffered",
    "run.callbacks",
]
LATER += ["saved", "secure", "sites", "strategies.fedprox", "tracking"]
"""What ``import fedtorch`` leaves to those runs that need it."""


def test_plain_training_and_help_start_without_the_slow_imports():
    code = f"""
import sys
import torch
before = set(sys.modules)
import fedtorch
print({{m.partition(".")[0] for m in set(sys.modules) - before}} - {{"fedtorch", *sys.stdlib_module_names}})
print([m for m in {LATER} if f"fedtorch.{{m}}" in sys.modules])
from fedtorch import Client, Server
from fedtorch.data import Digits
d = Digits().load(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
Server(model, [Client("0", d.train)]).round()
slow = "torch._dynamo", "sklearn", "matplotlib", "tensorboard", "pandas", "opacus", "scipy.special"
print([m for m in slow if m in sys.modules])
import contextlib, io, train
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    train.main(["--help"])
print([m for m in (*slow, "jsonargparse") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "[]", "[]", "[]"]


def test_a_round_that_nobody_counts_in_is_said():
    clients = [
        Client(c.id, (c.data.tensors[0] * math.nan, c.data.tensors[1]))
        for c in make_clients([5, 6])
    ]
    model = mlp()
    before = weights(model)
    server = Server(model, clients)
    with pytest.warns(UserWarning, match="no client counted.* stays as it was: 2 nonfinite"):
        figures = next(server.rounds(1))
    assert (figures["nobody"], figures["clients"], figures["nonfinite"]) == (1, 0, 2)
    assert not server.moved()
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    usual = Server(mlp(), make_clients([5, 6]))
    assert "nobody" not in next(usual.rounds(1)) and usual.moved()


class Look(Observer):
    """Keeps what it is shown, and adds a figure of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen, self.figures = model, [], []

    def sent(self, released: Released) -> None:
        self.seen.append(released)

    def round(self, figures):
        self.figures.append(dict(figures))
        return {"weights_norm": float(self.model[0].weight.detach().norm())}


def test_observers_see_what_was_sent_and_each_round_in_order_and_change_nothing():
    plain, model = mlp(), mlp()
    first, second = Look(model), Look(model)
    server = Server(model, make_clients([12, 5]), Recipe(Scaffold()), observers=[first, second])
    history = server.fit(2)
    Server(plain, make_clients([12, 5]), Recipe(Scaffold())).fit(2)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )
    assert sorted(i for r in first.seen for i in r.ids) == ["c0", "c0", "c1", "c1"]
    assert all(isinstance(r, Released) for r in first.seen)
    assert [r.ids for r in first.seen] == [r.ids for r in second.seen]
    assert [m["round"] for m in first.figures] == [1, 2] and "weights_norm" not in first.figures[0]
    assert second.figures[1]["weights_norm"] == history[1]["weights_norm"] > 0
    with pytest.raises(ConfigError, match="an observer must be an Observer, got function"):
        Server(mlp(), make_clients([5]), observers=[print_it])
    with pytest.raises(ConfigError, match="observers must be a list, got Observer"):
        Server(mlp(), make_clients([5]), observers=Observer())


def print_it(figures):
    print(figures)


def test_an_observer_sees_clipped_and_noised_updates_alone():
    seen = []
    for plan in (None, LocalDP(rounds=1, noise_multiplier=1.0, clip=1e-3)):
        server = Server(mlp(), make_clients([12, 5]), Recipe(lr=0.5, privacy=plan))
        seen.append(watched(server))
        server.round()
    norms = [
        max(float(v.flatten(1).norm(dim=1).max()) for r in sent for v in r.sent["delta"].values())
        for sent in seen
    ]
    assert norms[0] > 0.05 and norms[1] < 0.05  # a thousandth of the update, and noise of that size


@pytest.mark.parametrize("strict", [False, True])
def test_what_an_observer_makes_of_clients_work_is_marked_as_not_covered(strict):
    class Tells(Observer):
        def round(self, figures):
            return {"public": 1.0}

    class Joins(Observer):
        def join(self, total, task):
            self.norm = float(total.sums()["delta"]["0.weight"].norm())

        def round(self, figures):
            return {"sum_norm": self.norm}

    model, plan = mlp(), ClientLevel(noise_multiplier=1.0, rounds=1, strict=strict)
    looks = [Look(model), Tells(), Joins()]
    server = Server(model, make_clients([5] * 4), Recipe(privacy=plan), observers=looks)
    figures = server.round()
    assert "weights_norm" not in figures and figures["public"] == 1.0
    assert "sum_norm" not in figures
    assert all((f"nonprivate_{n}" in figures) is not strict for n in ("weights_norm", "sum_norm"))


def test_fit_draws_one_line_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    Server(mlp(), make_clients([12, 5])).fit(2)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.count("\r") == 2
    assert "round 2/2 ####################" in out


def test_a_server_judges_its_model_on_data_of_any_kind() -> None:
    client = make_clients([12])[0]
    x, y = client.data.tensors
    server = Server(mlp(), [client])
    found = server.evaluate((x.numpy(), y.numpy()))
    assert found == evaluate(server.model, client.data, {"loss": server.recipe.loss})
    assert [*server.evaluate((x, y), ["accuracy"])] == ["accuracy"]
    stepped = Server(
        mlp(), [client], Recipe(step=lambda model, batch: model(batch[0]).square().mean(1))
    )
    with pytest.raises(ConfigError, match="give metrics, or step=fn"):
        stepped.evaluate((x, y))
    figures = stepped.evaluate(
        (x, y), step=lambda model, batch: {"size": model(batch[0]).abs().mean(1)}
    )
    assert figures["size"] > 0


def test_a_fit_that_has_nothing_to_judge_by_is_refused_before_training():
    server = Server(mlp(), make_clients([8, 9]))
    x, y = torch.randn(7, 6), torch.arange(7) % 4
    for test, message in (
        (None, r"nothing to judge by metrics: give fit a test set"),
        ((x[:0], y[:0]), "test has no examples"),
        ((x[:, :5], y), "model Sequential fails on the data: .*shapes"),
    ):
        with pytest.raises(ConfigError, match=message):
            server.fit(2, test, ["accuracy"], progress=False)
    assert server.round_number == 0
    server.fit(1, (x, y), ["accuracy"], progress=False)
    with torch.no_grad(), pytest.raises(ConfigError, match=r"torch\.no_grad\(\) is on"):
        Server(mlp(), make_clients([8]))
