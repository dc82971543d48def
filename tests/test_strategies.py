from dataclasses import dataclass

import pytest
import torch

from conftest import make_clients, mlp, weights
from fedtorch import ConfigError, FedAvg, FedProx, Local, Recipe, Scaffold, Server, Strategy
from fedtorch.tree import tmap


def after(strategy: Strategy, rounds: int = 2) -> dict[str, torch.Tensor]:
    model = mlp()
    for _ in Server(model, make_clients([9, 20]), Recipe(strategy, batch_size=4)).rounds(rounds):
        pass
    return weights(model)


def test_fedprox_without_a_term_is_fedavg_and_with_a_large_one_hardly_moves():
    plain, zero, tight = after(FedAvg()), after(FedProx(mu=0.0)), after(FedProx(mu=9.0))
    start = mlp().state_dict()
    assert all(torch.equal(plain[k], zero[k]) for k in plain)
    moved = [sum(float((s[k] - start[k]).norm()) for k in start) for s in (tight, plain)]
    assert moved[0] < 0.5 * moved[1]


@pytest.mark.parametrize("mu", [-0.1, float("nan"), float("inf")])
def test_a_proximal_weight_that_cannot_be_meant_is_refused(mu):
    with pytest.raises(ConfigError, match=r"strategy\.mu"):
        FedProx(mu=mu)


def test_unknown_weighting_is_refused():
    with pytest.raises(ConfigError, match=r"strategy\.weighting"):
        FedAvg(weighting="size")


def test_scaffold_keeps_memory_on_the_client_and_a_variate_on_the_server():
    model, clients = mlp(), make_clients([9, 20])
    server = Server(model, clients, Recipe(Scaffold(), batch_size=4))
    server.round()
    own = [c.memory["c"] for c in server.clients]
    mean = tmap(lambda a, b: (a + b) / 2, *own)
    # all clients took part, so c is the mean of the c_k
    assert all(torch.allclose(server.extras["c"][k], v, atol=1e-6) for k, v in mean.items())
    assert float(own[0]["0.weight"].norm()) > 0


class ByRows(Scaffold):
    """Sends each client's own change and control variate."""

    @property
    def only_delta(self):
        return False


@pytest.mark.parametrize("solver", ["fast", "stacked", "general"])
@pytest.mark.parametrize("weighting", ["uniform", "examples"])
def test_scaffold_by_sums_is_scaffold_client_by_client(solver, weighting):
    """Clients of unequally many steps, of which each divides its change by its own."""
    ends = []
    for kind in (Scaffold, ByRows):
        recipe = Recipe(kind(weighting=weighting), batch_size=4, lr=0.1, epochs=2)
        server = Server(mlp(), make_clients([9, 20, 4]), recipe, engine=Local(solver=solver))
        assert recipe.needs_rows == (kind is ByRows)
        figures = [*server.rounds(3)][-1]
        own = [m["c"] for m in server.session.memory().values()]
        ends.append([server.model.state_dict(), server.extras["c"], *own])
        ends[-1].append({"bytes": torch.tensor(float(figures["bytes_up"]))})
    for one, other in zip(*ends, strict=True):
        assert all(torch.allclose(v, other[k], rtol=1e-5, atol=1e-6) for k, v in one.items())
    assert Recipe(Scaffold(option=1)).needs_rows, "its gradients are no multiple of the change"


@dataclass(frozen=True)
class SignedMean(Strategy):
    """A strategy nobody here prepared: the server moves by a fixed amount in the mean's direction."""

    amount: float = 0.01

    def step(self, mean, extras, share):
        return tmap(lambda d: self.amount * d.sign(), mean["delta"]), extras


def test_a_strategy_of_the_users_own_is_one_method():
    start, end = mlp().state_dict(), after(SignedMean(amount=0.25), rounds=1)
    for k in start:
        assert set(((end[k] - start[k]) * 4).round(decimals=4).abs().flatten().tolist()) <= {
            0.0,
            1.0,
        }


@dataclass(frozen=True, kw_only=True)
class Keeping(Strategy):
    """Hands its memory back as it was, or written to in place."""

    apart = True
    writes: bool = False

    def remember(self, params):
        return {"v": {k: torch.zeros_like(v) for k, v in params.items()}}

    def train(self, solve, ctx):
        v = ctx.memory["v"]
        if self.writes:
            v["0.weight"].add_(1)
        return solve(), {"v": v}


def test_memory_that_no_visit_changed_stays_as_it_is_and_what_was_written_in_place_is_kept():
    for writes in (False, True):
        clients = make_clients([9, 20])
        server = Server(mlp(), clients, Recipe(Keeping(writes=writes), batch_size=4))
        server.round()
        before = [c.memory["v"] for c in server.clients]
        server.round()
        assert [c.memory["v"] is b for c, b in zip(server.clients, before, strict=True)] == [
            not writes
        ] * 2
        assert all(float(c.memory["v"]["0.weight"].mean()) == 2 * writes for c in server.clients)


def test_two_servers_over_one_list_of_clients_remember_apart():
    def run(clients):
        return Server(mlp(), clients, Recipe(Scaffold(), batch_size=4))

    clients = make_clients([9, 20])
    alone, *both = run(make_clients([9, 20])), run(clients), run(clients)
    for server in (alone, alone, alone, *both * 3):
        server.round()
    assert all(torch.equal(alone.model[0].weight, s.model[0].weight) for s in both)
    assert not any(c.memory for c in clients)
    with pytest.raises(AttributeError):  # a list of one's own says nothing to a run that has begun
        alone.clients.append(clients[0])
