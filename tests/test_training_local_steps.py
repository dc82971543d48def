"""Optimizers, clipping, accumulation and schedules of local steps, against a loop in plain PyTorch."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, lr_scheduler

from conftest import make_clients, mlp, weights
from fedtorch import (
    Client,
    ClientOptimizer,
    ConfigError,
    FedProx,
    Local,
    Recipe,
    Scaffold,
    Server,
    seeds,
)
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.rounds.schedules import Exponential
from fedtorch.training.batches import batch_order
from fedtorch.training.local_steps import Descent, stepper

SIZES = [23, 5, 16, 9]
ORDER: dict[str, Any] = {"lr": 0.05, "epochs": 2, "batch_size": 4}


def heads_faster(model: nn.Module, lr: float, weight_decay: float = 0.1) -> Optimizer:
    """The head ten times as fast as the rest, and without decay."""
    rest = {"params": model[0].parameters(), "weight_decay": weight_decay}
    return AdamW([rest, {"params": model[2].parameters(), "lr": 10 * lr}], lr=lr, weight_decay=0)


def muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Matrices by Muon, the rest by AdamW."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [Muon(matrices, lr=lr), AdamW([p for p in model.parameters() if p.ndim < 2], lr=lr / 10)]


class Lion(Optimizer):
    """Chen et al. 2023 (arXiv:2302.06675, Alg. 2)."""

    def __init__(self, params: Any, lr: float, beta1: float = 0.9, beta2: float = 0.99) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.sub_(torch.lerp(p.grad, m, group["beta1"]).sign_(), alpha=group["lr"])
                m.lerp_(p.grad, 1 - group["beta2"])


def warm_then_cosine(optimizer: Optimizer, steps: int) -> lr_scheduler.LRScheduler:
    """What lr_warmup 3 and lr_decay cosine to a tenth are, in torch's own schedulers."""
    rise = lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / 3))
    fall = lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)
    if steps > 3:
        lrs = [g["initial_lr"] for g in optimizer.param_groups]
        fall = lr_scheduler.CosineAnnealingLR(optimizer, steps - 3, eta_min=lrs[0] / 10)
    return lr_scheduler.SequentialLR(optimizer, [rise, fall], [3])


def by_hand(
    client: Client,
    recipe: Recipe,
    start: nn.Module,
    make: Callable[[nn.Module, float], Any],
    scheduler: Callable[[Optimizer, int], lr_scheduler.LRScheduler] | None = None,
    lr: float | None = None,
    round: int = 0,
) -> nn.Module:
    """A visit, as one would write it: batch after batch, a step after so many of them."""
    model, (x, y) = copy.deepcopy(start), client.data.tensors
    made = make(model, lr or recipe.learning_rate)
    made = made if isinstance(made, list) else [made]
    seed = seeds.derive(0, "order", round, client.id)
    every = batch_order(len(x), replace(recipe, accumulate=1), seed)
    passes = every.view(recipe.epochs, -1, every.shape[1])
    groups = [g for one in passes for g in one.split(recipe.accumulate)]
    schedules = [scheduler(o, len(groups)) for o in made] if scheduler else []
    for group in groups:
        model.zero_grad()
        total = int((group >= 0).sum())
        for batch in group:
            index = batch[batch >= 0]
            loss = nn.functional.cross_entropy(model(x[index]), y[index])
            (loss * len(index) / total).backward()
        if recipe.clip_norm:
            clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for part in (*made, *schedules):
            part.step()
    return model


def mean(models: list[nn.Module], sizes: list[int]) -> dict[str, Tensor]:
    states = [m.state_dict() for m in models]
    return {
        k: sum(n * s[k].double() for n, s in zip(sizes, states, strict=True)) / sum(sizes)
        for k in states[0]
    }


CASES: dict[str, tuple[dict[str, Any], Callable[[nn.Module, float], Any], Any]] = {
    "class": ({"optimizer": Adam}, lambda m, lr: Adam(m.parameters(), lr), None),
    "name": ({"optimizer": "adamw"}, lambda m, lr: AdamW(m.parameters(), lr), None),
    "partial": (
        {"optimizer": partial(SGD, momentum=0.9, nesterov=True)},
        lambda m, lr: SGD(m.parameters(), lr, momentum=0.9, nesterov=True),
        None,
    ),
    "own class": ({"optimizer": Lion, "lr": 0.003}, lambda m, lr: Lion(m.parameters(), lr), None),
    "groups": ({"optimizer": heads_faster}, heads_faster, None),
    "arguments": (
        {"optimizer": ClientOptimizer(heads_faster, {"weight_decay": 0.5})},
        partial(heads_faster, weight_decay=0.5),
        None,
    ),
    "muon": ({"optimizer": muon}, muon, None),
    "clipped": ({"clip_norm": 0.3}, lambda m, lr: SGD(m.parameters(), lr), None),
    "clipped adam": (
        {"clip_norm": 0.3, "optimizer": "adam"},
        lambda m, lr: Adam(m.parameters(), lr),
        None,
    ),
    "accumulated": ({"accumulate": 3}, lambda m, lr: SGD(m.parameters(), lr), None),
    "warm": (
        {"lr_warmup": 3, "lr_decay": "cosine", "lr_floor": 0.1},
        lambda m, lr: SGD(m.parameters(), lr, momentum=0.9),
        warm_then_cosine,
    ),
    "linear": (
        {"lr_decay": "linear"},
        lambda m, lr: SGD(m.parameters(), lr),
        lambda o, steps: lr_scheduler.LinearLR(o, 1.0, 0.0, steps),
    ),
    "scheduler": (
        {"scheduler": warm_then_cosine, "optimizer": heads_faster},
        heads_faster,
        warm_then_cosine,
    ),
    "all": (
        {"accumulate": 2, "clip_norm": 0.3, "lr_decay": "linear", "optimizer": muon},
        muon,
        lambda o, steps: lr_scheduler.LinearLR(o, 1.0, 0.0, steps),
    ),
}
CASES["warm"][0]["optimizer"] = partial(SGD, momentum=0.9)


@pytest.mark.parametrize("case", CASES)
def test_a_round_is_the_loop_that_one_would_write(case):
    """However clients are put together, to 1e-6."""
    given, make, scheduler = CASES[case]
    recipe, clients = Recipe(**(ORDER | given)), make_clients(SIZES)
    want = mean([by_hand(c, recipe, mlp(), make, scheduler) for c in clients], SIZES)
    engines = [Local(), Local(chunk=1), Local(chunk=4), Local(solver="general")]
    for engine in engines + [Local(solver="fast")] * (case == "accumulated"):
        server = Server(mlp(), clients, recipe, engine=engine)
        server.round()
        got = server.model.state_dict()
        assert all(torch.allclose(got[k].double(), want[k], rtol=0, atol=1e-6) for k in want), (
            engine
        )
    moved = max(float((want[k] - v).abs().max()) for k, v in mlp().state_dict().items())
    assert moved > 1e-2


def test_options_of_local_steps_reach_worker_processes():
    """A function, accumulation, clipping and a schedule; the same to the last bit as in this process."""
    given = {"accumulate": 2, "clip_norm": 0.3, "lr_warmup": 2, "optimizer": muon}
    found = []
    for engine in (Local(chunk=1), Processes(workers=1)):
        server = Server(mlp(), make_clients(SIZES), Recipe(**(ORDER | given)), engine=engine)
        server.round()
        server.close()
        found.append(weights(server.model))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_the_schedule_over_rounds_scales_all_groups():
    recipe, clients = Recipe(**ORDER, optimizer=heads_faster), make_clients([8, 8])
    server = Server(mlp(), clients, recipe, schedule=Exponential(decay=0.5))
    for r, lr in enumerate((0.05, 0.025)):
        visits = [by_hand(c, recipe, server.model, heads_faster, lr=lr, round=r) for c in clients]
        assert server.round()["lr"] == pytest.approx(lr)
        want, got = mean(visits, [8, 8]), server.model.state_dict()
        assert all(torch.allclose(got[k].double(), want[k], rtol=0, atol=1e-6) for k in want)


@pytest.mark.parametrize("case", ["groups", "muon", "all", "warm", "accumulated", "clipped"])
def test_a_run_that_goes_on_is_the_same_run_to_the_last_bit(case):
    recipe = Recipe(**(ORDER | CASES[case][0]))
    one, two, three = (Server(mlp(), make_clients(SIZES), recipe) for _ in range(3))
    [*one.rounds(3)], [*two.rounds(1)]
    three.load_state_dict(two.state_dict())
    [*three.rounds(2)]
    a, b = weights(one.model), weights(three.model)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(
    "given", [{"accumulate": 3}, {"lr_warmup": 2, "lr_decay": "cosine"}], ids=str
)
@pytest.mark.parametrize("solver", ["auto", "general"])
def test_scaffold_divides_by_the_rates_of_the_steps_that_were_taken(given, solver):
    """In the first round no gradient is shifted yet: the variate is the mean of the steps' gradients."""
    client, recipe = make_clients([23])[0], Recipe(Scaffold(), **(ORDER | given))
    server = Server(mlp(), [client], recipe, engine=Local(solver=solver))
    start = weights(server.model)
    server.round()
    steps = 2 * (2 if "accumulate" in given else 6)
    rates = [0.05] * steps
    if "lr_warmup" in given:
        model = nn.Linear(1, 1)
        optimizer = SGD(model.parameters(), 0.05)
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, steps - 2)
        rates = [0.025, 0.05]
        for _ in range(steps - 2):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cosine.step()
    for k, c in server.clients[0].memory["c"].items():
        want = (start[k] - server.model.state_dict()[k]) / sum(rates)
        assert torch.allclose(c, want, rtol=1e-4, atol=1e-6)


def test_steps_count_what_the_optimizer_did():
    for given, steps in [({"accumulate": 3}, 4), ({"accumulate": 3, "steps": 5, "epochs": 1}, 5)]:
        for solver in ("auto", "general"):
            recipe = Recipe(**(ORDER | given))
            server = Server(mlp(), make_clients([23]), recipe, engine=Local(solver=solver))
            server.round()
            assert server.visits.values["steps"].tolist() == [steps]


def test_a_batch_of_a_step_of_several_is_never_larger_than_one():
    """Nor filled up: layers that look at the whole batch see each batch as it comes."""
    seen: list[int] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    recipe = Recipe(lr=0.1, epochs=1, batch_size=4, accumulate=3)
    server = Server(Watched(6, 4), make_clients([23]), recipe, engine=Local(solver="general"))
    seen.clear()
    server.round()
    assert seen == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("solver", ["stacked", "general"])
def test_the_gradient_is_clipped_before_the_strategy_corrects_it(solver):
    class Pulled(SGD):
        def step(self) -> None:  # type: ignore[override]
            for p, w in zip(self.param_groups[0]["params"], mlp().parameters(), strict=True):
                p.grad += p.detach() - w.detach()
            super().step()

    recipe, clients = Recipe(FedProx(mu=1.0), **ORDER, clip_norm=0.1), make_clients([16, 16])
    server = Server(mlp(), clients, recipe, engine=Local(solver=solver))
    server.round()
    made = [by_hand(c, recipe, mlp(), lambda m, lr: Pulled(m.parameters(), lr)) for c in clients]
    want, got = mean(made, [16, 16]), server.model.state_dict()
    assert all(torch.allclose(got[k].double(), want[k], rtol=0, atol=1e-6) for k in want)


@pytest.mark.parametrize("optimizer", [muon, "muon", Lion, heads_faster])
def test_private_steps_take_any_optimizer(optimizer):
    """It steps by the noised gradient; nothing is stacked that it could not step so."""
    model = nn.Linear(6, 4, bias=False) if optimizer == "muon" else mlp()
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, sample_rate=0.5, steps=3, batch_size=4.0)
    recipe = Recipe(optimizer=optimizer, lr=0.01, privacy=plan, lr_decay="linear")
    server, before = Server(model, make_clients([8] * 9), recipe), weights(model)
    server.round()
    assert server.visits.ids and any(
        not torch.equal(v, before[k]) for k, v in server.model.state_dict().items()
    )


def test_plain_sgd_is_still_done_here_and_stacked_with_a_clip():
    step = stepper(Recipe(), mlp(), dict(mlp().named_parameters()), 0.1, 3)
    assert isinstance(step, Descent)
    recipe = Recipe(**ORDER, clip_norm=0.3, privacy=ClientLevel(noise_multiplier=0.1, rounds=1))
    server = Server(mlp(), make_clients(SIZES), recipe)
    assert "the fast path is not used: gradients are clipped (clip_norm)" in server.notes
    server.round()


def elsewhere(model: nn.Module, lr: float) -> Optimizer:
    return SGD(mlp().parameters(), lr)


REFUSED = {
    "None": (lambda m, lr: None, r"must return a torch.optim.Optimizer, or a list .*got None"),
    "empty": (lambda m, lr: [], r"leaves out parameter 0.weight, 0.bias, 2.weight and 1 more"),
    "parts": (lambda m, lr: SGD(m[0].parameters(), lr), r"leaves out parameter 2.weight, 2.bias: "),
    "foreign": (
        elsewhere,
        r"optimizer elsewhere has a parameter \[12, 6\] that is none of the model",
    ),
    "twice": (
        lambda m, lr: [SGD(m.parameters(), lr), SGD(m[0].parameters(), lr)],
        r"steps parameter 0.weight twice",
    ),
    "params": (lambda params, lr: SGD(params, lr), r"; it is called as fn\(model, lr\)"),
    "fails": (lambda m: m, r"cannot train model Sequential: .*takes 1 positional argument but 2"),
    "closure": (
        lambda m, lr: torch.optim.LBFGS(m.parameters(), lr),
        "LBFGS computes the loss anew",
    ),
    "lbfgs": ("lbfgs", "LBFGS computes the loss anew within a step"),
    "LBFGS": (torch.optim.LBFGS, "LBFGS computes the loss anew within a step"),
    "sparse": ("torch.optim.SparseAdam", "SparseAdam takes sparse gradients alone"),
    "object": (
        SGD(mlp().parameters(), 0.1),
        r"an object of SGD, made for one model's weights.*fn\(model",
    ),
    "number": (5, r"optimizer must be a name, a class or a function fn\(model, lr\), got 5"),
    "module": (nn.Linear, "'Linear' is no optimizer"),
    "muon": ("muon", r"Muon only supports 2D.*fn\(model, lr\) may give several optimizers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_optimizers_that_cannot_train_the_model_are_refused_before_training(case):
    optimizer, why = REFUSED[case]
    model = mlp()
    before = weights(model)
    with pytest.raises(ConfigError, match=why):
        Server(model, make_clients([9]), Recipe(optimizer=optimizer))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_frozen_parameters_may_be_left_out_or_not():
    for make in (
        lambda m, lr: SGD(m.parameters(), lr),
        lambda m, lr: SGD([p for p in m.parameters() if p.requires_grad], lr),
    ):
        model = mlp()
        model[0].requires_grad_(False)
        Server(model, make_clients([9]), Recipe(optimizer=make)).round()
        assert torch.equal(model[0].weight, mlp()[0].weight)
        assert not torch.equal(model[2].weight, mlp()[2].weight)


def test_rates_that_do_not_follow_the_rounds_are_said():
    recipe = Recipe(optimizer=lambda m, lr: Adam(m.parameters(), 1e-3))
    notes = Server(mlp(), make_clients([9]), recipe).notes
    assert any("has learning rates of its own: lr and schedule do not change" in n for n in notes)
    notes = Server(mlp(), make_clients([9]), Recipe(optimizer=heads_faster)).notes
    picky = {0.1: 0.2}
    Server(mlp(), make_clients([9]), Recipe(optimizer=lambda m, lr: SGD(m.parameters(), picky[lr])))
    assert not any("learning rates" in n for n in notes)


@pytest.mark.parametrize(
    "given, why",
    [
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"clip_norm": 0}, "clip_norm must be a positive number"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"lr_warmup": -1}, "lr_warmup must be a number >= 0"),
        ({"lr_warmup": 1.5}, "lr_warmup must be a whole number"),
        ({"lr_warmup": 13}, "lr_warmup 13 is longer than any client's visit"),
        ({"lr_floor": 1.1, "lr_decay": "linear"}, r"lr_floor must be in \[0, 1\]"),
        ({"lr_decay": "cosinus"}, "lr_decay must be constant or linear or cosine"),
        ({"scheduler": 3}, "scheduler must be a function"),
        ({"scheduler": lambda o, n: None}, "must return an LRScheduler .*, got None"),
        ({"scheduler": lambda o, n: lr_scheduler.ReduceLROnPlateau(o)}, "needs no metric"),
        ({"scheduler": lambda o: o}, r"scheduler fails, called as fn\(optimizer, 2\): TypeError"),
    ],
)
def test_odd_options_of_local_steps_are_refused_before_training(given, why):
    with pytest.raises(ConfigError, match=why):
        Server(mlp(), make_clients([23, 5]), Recipe(**(ORDER | given)))
    Server(mlp(), make_clients([23, 5]), Recipe(**ORDER, lr_warmup=12))


@pytest.mark.parametrize(
    "args, ours",
    [
        ({}, True),
        ({"momentum": 0.0, "weight_decay": 0.0}, True),
        ({"momentum": 0.9}, True),
        ({"weight_decay": 0.01}, True),
        ({"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}, True),
        ({"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, True),
        ({"maximize": True}, False),
        ({"momentum": 0.9, "foreach": True}, False),
    ],
)
def test_a_stepper_is_torchs_own_step_to_the_last_bit(args, ours):
    g = torch.Generator().manual_seed(0)
    here = [torch.randn(5, 3, generator=g).requires_grad_() for _ in range(4)]
    there = [p.detach().clone().requires_grad_() for p in here]
    recipe = Recipe(optimizer=ClientOptimizer("SGD", args))
    step = stepper(recipe, nn.Module(), dict(enumerate(here)), 0.3, 4)
    assert isinstance(step, Descent) is ours
    torchs = torch.optim.SGD(there, lr=0.3, **args)
    for t in range(4):
        for k, (p, q) in enumerate(zip(here, there, strict=True)):
            # the third has a gradient now and then, the last never
            p.grad = torch.randn(5, 3, generator=g) if k < 2 or (k == 2 and t % 2) else None
            q.grad = None if p.grad is None else p.grad.clone()
        step()
        torchs.step()
    assert all(torch.equal(p, q) for p, q in zip(here, there, strict=True))
    assert not torch.equal(here[0], here[3])


def test_a_step_without_any_gradient_moves_nothing():
    p = torch.ones(2).requires_grad_()
    stepper(Recipe(), nn.Module(), {"p": p}, 0.1, 1)()
    assert p.tolist() == [1, 1]


def test_a_scheduler_that_ends_before_a_visit_is_refused_before_training():
    clients = make_clients([40, 20])

    def short(optimizer, steps):
        return lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)

    with pytest.raises(ConfigError, match=r"fails after step 4 of a visit of 4 steps .*fn\(optim"):
        Server(mlp(), clients, Recipe(scheduler=short, batch_size=10, epochs=1))
    Server(mlp(), clients, Recipe(scheduler=short, batch_size=20, epochs=1)).round()


def test_epochs_beside_steps_are_said_to_do_nothing():
    notes = Server(mlp(), make_clients([9]), Recipe(epochs=7, steps=2)).notes
    assert "steps 2 a visit: epochs 7 does not apply" in notes
    notes = Server(mlp(), make_clients([9]), Recipe(steps=2)).notes
    assert not any("does not apply" in n for n in notes)
