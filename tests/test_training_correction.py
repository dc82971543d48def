"""A correction of gradients that a user declares: the same steps on every solver, by hand and by torch."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from conftest import make_clients, mlp, weights
from fedtorch import (
    ClientOptimizer,
    ConfigError,
    Correction,
    FedAvg,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
)
from fedtorch.engines import Processes
from fedtorch.privacy import Nothing, SampleLevel
from fedtorch.training.correction import correction
from fedtorch.tree import expand, per_client, tmap
from fedtorch.types import Context

SIZES = [21, 9, 14, 5]
MOMENTUM = ClientOptimizer("SGD", {"momentum": 0.9, "weight_decay": 0.01})


@dataclass(frozen=True, kw_only=True)
class Drawn(FedAvg):
    """Back to the start, and along a way of each client's own that it remembers."""

    pull: float = 0.0
    along: float = 0.0

    def remember(self, params):
        return {"way": tmap(torch.zeros_like, params)}

    def correction(self, ctx):
        if not self.along:
            return Correction(self.pull)
        way = {
            k: v + self.along * per_client(1 / ctx.steps, v) for k, v in ctx.memory["way"].items()
        }
        way.pop("2.bias", None)  # not every weight is shifted
        return Correction(self.pull, way)

    def upload(self, params, ctx):
        sent, _ = super().upload(params, ctx)
        return sent, {"way": tmap(lambda d: 0.5 * d, sent["delta"])}


def trained(recipe: Recipe, engine) -> dict[str, torch.Tensor]:
    model = mlp()
    server = Server(model, make_clients(SIZES), recipe, engine=engine, seed=3)
    try:
        assert all(figures["clients"] == len(SIZES) for figures in server.rounds(3))
    finally:
        server.close()
    return weights(model)


@pytest.mark.parametrize("optimizer", [ClientOptimizer("SGD"), MOMENTUM], ids=["sgd", "momentum"])
@pytest.mark.parametrize("pull, along", [(0.7, 0.0), (0.0, 0.3), (0.7, 0.3), (-0.2, 0.3)])
def test_a_strategy_nobody_prepared_trains_alike_on_every_solver(pull, along, optimizer):
    recipe = Recipe(
        Drawn(pull=pull, along=along), optimizer=optimizer, lr=0.1, epochs=2, batch_size=4
    )
    slow = trained(recipe, Local(solver="general"))
    plain = trained(Recipe(optimizer=optimizer, lr=0.1, epochs=2, batch_size=4), Local())
    assert max(float((slow[k] - plain[k]).abs().max()) for k in slow) > 1e-3
    for engine in (Local(solver="stacked"), Local(solver="fast"), Local(solver="fast", chunk=2)):
        found = trained(recipe, engine)
        for k, v in slow.items():
            torch.testing.assert_close(found[k], v, rtol=0, atol=1e-6)


def test_workers_correct_as_the_engine_here_does():
    recipe = Recipe(Drawn(pull=0.7, along=0.3), lr=0.1, batch_size=4)
    here = trained(recipe, Local(solver="fast", chunk=2))
    there = trained(recipe, Processes(workers=2, chunk=2, device="cpu", solver="fast"))
    assert all(torch.equal(here[k], v) for k, v in there.items())


@pytest.mark.parametrize("solver", ["general", "fast"])
def test_private_steps_are_corrected_after_clipping_and_noise(solver):
    plan = SampleLevel(clip=0.5, noise_multiplier=1.0, rounds=3, insecure_seed=1)
    strategy = Drawn(pull=0.7, along=0.3, weighting="uniform")
    recipe = Recipe(strategy, lr=0.1, batch_size=4, privacy=plan)
    slow, found = (trained(recipe, Local(solver=s)) for s in ("stacked", solver))
    for k, v in slow.items():
        torch.testing.assert_close(found[k], v, rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["general", "stacked"])
def test_steps_are_those_written_by_hand(solver):
    (client,) = make_clients([6])
    x, y = client.data.tensors
    strategy = Drawn(pull=0.7, along=0.3)
    recipe = Recipe(strategy, lr=0.1, epochs=3, batch_size=None)
    found, hand = mlp(), mlp()
    Server(found, [client], recipe, engine=Local(solver=solver)).round()
    start = weights(hand)
    for _ in range(3):
        hand.zero_grad()
        nn.functional.cross_entropy(hand(x), y).backward()
        with torch.no_grad():
            for name, p in hand.named_parameters():
                shift = 0.0 if name == "2.bias" else 0.3 / 3
                p -= 0.1 * (p.grad + 0.7 * (p - start[name]) + shift)
    for k, v in weights(hand).items():
        torch.testing.assert_close(weights(found)[k], v, rtol=0, atol=1e-6)


def test_what_correct_is_given_is_corrected_already():
    seen = []

    class Both(Drawn):
        def correct(self, grads, params, ctx):
            seen.append({k: g.clone() for k, g in grads.items()})
            return tmap(lambda g: g * 0.5, grads)

    recipe = Recipe(Both(along=1e3), lr=1e-6, batch_size=None)
    Server(mlp(), make_clients([6]), recipe, engine=Local(solver="general")).round()
    assert all(float(g.min()) > 100 for g in (seen[-1]["0.weight"], seen[-1]["0.bias"]))
    assert float(seen[-1]["2.bias"].abs().max()) < 10


class Wrong(FedAvg):
    """Corrects by whatever it is given."""

    def correction(self, ctx):
        return self.by(ctx)


@pytest.mark.parametrize(
    "by, why",
    [
        (lambda ctx: None, "must return a Correction, not NoneType"),
        (lambda ctx: Correction(float("nan")), "has the pull nan"),
        (lambda ctx: Correction(shift={"head": torch.ones(1, 3)}), "shifts head, which is no"),
        (
            lambda ctx: Correction(shift={"0.bias": torch.ones(3)}),
            r"0\.bias by \[3\], not by \[1, 12\]",
        ),
    ],
)
@pytest.mark.parametrize("solver", ["general", "auto"])
def test_what_cannot_be_meant_is_refused_before_training(by, why, solver):
    kind = type("Wrong", (Wrong,), {"by": staticmethod(by)})
    with pytest.raises(ConfigError, match=rf"strategy Wrong cannot correct gradients.*{why}"):
        Server(mlp(), make_clients(SIZES), Recipe(kind()), engine=Local(solver=solver))


def test_a_shift_is_of_the_weights_type_and_has_a_row_for_each_client():
    anchor = expand({"w": torch.ones(2), "b": torch.ones(1)})
    one = type(
        "One",
        (Wrong,),
        {"by": staticmethod(lambda c: Correction(1, {"w": torch.ones(1, 2).double()}))},
    )
    pull, shift = correction(one(), Context(anchor, {}, {}, torch.ones(3), 0.1))
    assert pull == 1.0 and shift["w"].dtype == torch.float32
    assert shift["w"].tolist() == [[1.0, 1.0]] * 3 and shift["b"].tolist() == [[0.0]] * 3


def test_the_papers_corrections():
    anchor = expand({"w": torch.ones(2)})
    memory, extras = (
        {"c": {"w": torch.tensor([[1.0, 2.0], [5.0, 5.0]])}},
        {"c": {"w": torch.ones(1, 2)}},
    )
    ctx = Context(anchor, extras, memory, torch.ones(2), 0.1)
    assert FedProx(mu=0.3).correction(ctx) == (0.3, None)
    pull, shift = Scaffold().correction(ctx)
    assert pull == 0 and shift["w"].tolist() == [[0.0, -1.0], [-4.0, -4.0]]
    assert FedAvg().correction(ctx) == (0.0, None)


@dataclass(frozen=True, kw_only=True)
class Careless(FedAvg):
    """Draws from the generators that everybody shares, and uses none of it but in ``noise``."""

    noise: float = 0.0
    silent: bool = False

    def correction(self, ctx):
        self.draw()
        return Correction(0.1)

    def correct(self, grads, params, ctx):
        return tmap(lambda g: g + self.noise * self.draw(), grads)

    def upload(self, params, ctx):
        self.draw()
        return super().upload(params, ctx)

    def draw(self):
        return 0.0 if self.silent else float(torch.rand(())) + random.random() + np.random.rand()


PLANS = [Nothing(), SampleLevel(noise_multiplier=1.0, rounds=3, insecure_seed=1, steps=2)]
ENGINES = [Local(solver="general"), Local(chunk=1, solver="general"), Local(solver="stacked")]


@pytest.mark.parametrize("plan", PLANS, ids=["plain", "private"])
@pytest.mark.parametrize("engine", ENGINES, ids=["sequential", "general", "stacked"])
def test_what_a_strategy_draws_moves_no_dropout_mask_and_repeats(engine, plan):
    def run(strategy):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.5), nn.Linear(12, 4))
        torch.seed()  # from here on nobody knows what the global generators give
        recipe = Recipe(strategy, lr=0.1, privacy=plan)
        server = Server(model, make_clients(SIZES), recipe, engine=engine, seed=3)
        server.round()
        return weights(model)

    drawn, silent = run(Careless()), run(Careless(silent=True))
    assert all(torch.equal(v, silent[k]) for k, v in drawn.items())
    # who gets which number would hang on who is there
    if engine.solver == "stacked" and not plan.claims:
        with pytest.raises(ConfigError, match=r"draws from torch\.rand"):
            run(Careless(noise=0.1))
        return
    one, other = run(Careless(noise=0.1)), run(Careless(noise=0.1))
    assert all(torch.equal(v, other[k]) for k, v in one.items())
    assert not torch.equal(one["0.weight"], silent["0.weight"])


def test_each_call_draws_anew():
    found = []

    @dataclass(frozen=True, kw_only=True)
    class Told(FedAvg):
        def correct(self, grads, params, ctx):
            found.append(float(torch.rand(())))
            return grads

    Server(
        mlp(), make_clients([8]), Recipe(Told(), batch_size=4), engine=Local(solver="general")
    ).round()
    assert len({*found[-4:]}) == 4
