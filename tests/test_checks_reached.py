"""What a loss reaches beside the weights that clients train is refused before anybody trains."""

import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import make_clients, mlp
from fedtorch import ConfigError, Local, Recipe, Server
from fedtorch.privacy import SampleLevel
from fedtorch.training.losses import cross_entropy


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.zeros(4, 4))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output - self.centres[target]).square().sum(1)

    def later(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


class Holder:
    def __init__(self) -> None:
        self.temperature = nn.Parameter(torch.ones(()))

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output / self.temperature, target)


def tempered(t: Tensor, output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output / t, target)


WARMTH = nn.Parameter(torch.ones(()))


def worldly(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output * WARMTH, target)


@pytest.mark.parametrize(
    "loss",
    [
        Centres(),
        Centres().later,
        Holder(),
        partial(tempered, nn.Parameter(torch.ones(()))),
        worldly,
        lambda o, t: cross_entropy(o, t) * WARMTH,
        nn.ModuleList([Centres()])[0],
    ],
)
@pytest.mark.parametrize("solver", ["auto", "general"])
def test_parameters_of_the_loss_are_refused_wherever_it_has_them(loss, solver):
    with pytest.raises(
        ConfigError, match=r"the loss has a trainable parameter .*make it a parameter of"
    ):
        Server(mlp(), make_clients([5, 6]), Recipe(loss=loss), engine=Local(solver=solver))


def test_a_penalty_on_the_model_that_was_handed_over_is_refused():
    model = mlp()

    def penalised(output, target):
        return cross_entropy(output, target) + 0.1 * model[2].weight.square().sum()

    with pytest.raises(ConfigError, match=r"uses parameter 2.weight of the very model handed over"):
        Server(model, make_clients([5, 6]), Recipe(loss=penalised))
    assert all(p.grad is None for p in model.parameters())


def test_a_tensor_that_is_no_parameter_is_refused():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(6, 4), torch.ones(1, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale

    with pytest.raises(
        ConfigError, match=r"shape \[1\] that requires a gradient and is no parameter"
    ):
        Server(Scaled(), make_clients([5, 6]))


def test_what_is_only_looked_at_is_no_mistake():
    teacher, model = mlp(), mlp()
    frozen = Centres().requires_grad_(False)

    def distilled(output, target):
        with torch.no_grad():
            wanted = teacher(torch.ones(1, 6))
        return frozen(output, target) + (output - wanted - model[2].bias.detach()).square().sum(1)

    assert Server(model, make_clients([5, 6]), Recipe(loss=distilled)).round()["clients"] == 2


@pytest.mark.parametrize(
    "change, how",
    [
        (lambda m: m[0].weight.requires_grad_(False), "0.weight of server.model was frozen"),
        (lambda m: m[2].bias.requires_grad_(True), "2.bias of server.model was unfrozen"),
        (lambda m: m.append(nn.Linear(4, 4)), "3.weight of server.model is new"),
        (lambda m: setattr(m[0], "bias", None), "0.bias of server.model is gone"),
        (lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(3, 6))), "has another shape"),
        (lambda m: m.double(), "0.weight of server.model became torch.float64 after"),
    ],
)
def test_a_model_changed_after_the_server_was_made_is_refused(change, how):
    model = mlp()
    model[2].bias.requires_grad_(False)
    server = Server(model, make_clients([5, 6]))
    server.round()
    change(server.model)
    with pytest.raises(ConfigError, match=how):
        server.round()
    assert server.round_number == 1


def test_weights_put_in_place_of_others_are_trained_on():
    ends = []
    for replace in (False, True):
        model = mlp()
        server = Server(model, make_clients([5, 6]))
        if replace:
            model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        server.round()
        ends.append(model[0].weight)
    assert torch.equal(*ends)


class Scaled(nn.Module):
    """A loss over its own running mean, in a buffer or in an attribute."""

    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.attribute, self.count, self.table = attribute, 0, None

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(output, target)
        self.table = torch.ones(4) if self.table is None else self.table  # made once
        if self.attribute:
            self.count += 1
        else:
            self.mean.mul_(0.5).add_(losses.detach().mean(), alpha=0.5)
        return losses / self.mean


@pytest.mark.parametrize("attribute, what", [(False, "mean"), (True, "attribute count")])
def test_a_loss_that_keeps_something_from_call_to_call_is_refused(attribute, what):
    loss = Scaled(attribute)
    for given in (loss, loss.forward):
        with pytest.raises(ConfigError, match=rf"keeps something from call to call \({what}"):
            Server(mlp(), make_clients([5, 6]), Recipe(loss=given))


class Counter:
    calls = 0

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return cross_entropy(output, target) * min(1, self.calls / 1000)

    def method(self, output: Tensor, target: Tensor) -> Tensor:
        return self(output, target)


def running(kind: str):
    """A loss over its own running mean, kept in one place or another."""
    mean, table, state = torch.ones(()), {"mean": 1.0}, SimpleNamespace(mean=1.0)

    def cell(output, target):
        nonlocal mean
        losses = cross_entropy(output, target) / mean
        mean = 0.9 * mean + 0.1 * losses.detach().mean()
        return losses

    def table_of(output, target):
        losses = cross_entropy(output, target) / table["mean"]
        table["mean"] = 0.9 * table["mean"] + 0.1 * float(losses.detach().mean())
        return losses

    def space(output, target):
        losses = cross_entropy(output, target) / state.mean
        state.mean = 0.9 * state.mean + 0.1 * float(losses.detach().mean())
        return losses

    def default(output, target, kept=[1.0]):  # noqa: B006
        kept.append(0.1 * float(output.detach().mean()))
        return cross_entropy(output, target) + sum(kept)

    def attribute(output, target):
        attribute.calls = getattr(attribute, "calls", 0) + 1
        return cross_entropy(output, target) * min(1, attribute.calls / 1000)

    def outside(output, target):
        global CALLS
        CALLS += 1
        return cross_entropy(output, target) * min(1, CALLS / 1000)

    inner = {"cell": cell, "table": table_of, "space": space, "default": default,
             "attribute": attribute, "outside": outside}[kind]  # fmt: skip
    return lambda output, target: inner(output, target)


CALLS = 0


@pytest.mark.parametrize(
    "loss, what",
    [
        (Counter(), "calls"),
        (Counter().method, "Counter.calls"),
        (partial(Counter()), "partial.calls"),
        (running("cell"), "inner.mean"),
        (running("table"), "inner.table"),
        (running("space"), "the same batch has another loss after others"),
        (running("default"), "inner.default 0"),
        (running("attribute"), "inner.calls"),
        (running("outside"), "inner.CALLS"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_function_that_keeps_something_is_refused_wherever_it_is_kept(loss, what):
    with pytest.raises(ConfigError, match=rf"keeps something from call to call \({what}"):
        Server(mlp(), make_clients([5, 6]), Recipe(loss=loss))


def test_a_function_may_draw_look_up_and_keep_what_it_makes_once():
    weights, made = torch.ones(4), {}

    def noisy(output, target):
        if len(target) not in made:
            made[len(target)] = torch.ones(len(target))
        noise = torch.rand(len(target)) + np.random.rand() + random.random()
        return cross_entropy(output, target) * weights[target] * made[len(target)] * noise

    assert Server(mlp(), make_clients([5, 6]), Recipe(loss=noisy)).round()["clients"] == 2


def test_a_loss_may_make_something_once():
    class Smoothed(nn.CrossEntropyLoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.table = torch.ones(4)
            return super().forward(output * self.table, target)

    assert Server(mlp(), make_clients([5, 6]), Recipe(loss=Smoothed())).round()["clients"] == 2


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_gradient_that_copies_would_lose_is_refused(hook):
    model = mlp()
    getattr(model[0].weight, hook)(lambda g: None)
    with pytest.raises(ConfigError, match=r"parameter 0.weight .* has a hook on its gradient"):
        Server(model, make_clients([5, 6]))


def test_a_model_that_freezes_itself_is_refused():
    class Freezes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self[0].requires_grad_(False)
            return super().forward(x)

    with pytest.raises(ConfigError, match=r"0.bias .* is frozen or unfrozen as the model runs"):
        Server(Freezes(*mlp()), make_clients([5, 6]))


@pytest.mark.parametrize("solver", ["auto", "general"])
def test_a_model_that_writes_on_its_input_leaves_the_clients_data_alone(solver):
    class Halves(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    clients = make_clients([5, 6])
    before = [c.data.tensors[0].clone() for c in clients]
    Server(Halves(*mlp()), clients, Recipe(), engine=Local(solver=solver)).round()
    assert all(torch.equal(c.data.tensors[0], x) for c, x in zip(clients, before, strict=True))


@pytest.mark.parametrize("kind", ["step", "loss"])
def test_what_keeps_the_rows_it_is_first_given_is_refused_under_sample_level_privacy(
    kind: str,
) -> None:
    kept: list[Tensor] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if not kept:
            kept.append(output.detach().clone())
        return cross_entropy(output + 0 * kept[0][0], target)

    def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(model(batch[0]), batch[1])

    chosen = {"step": step} if kind == "step" else {"loss": loss}
    plan = SampleLevel(noise_multiplier=1.0, rounds=1, clip=1.0)
    with pytest.raises(ConfigError, match=rf"the {kind} keeps something of what it is first given"):
        Server(mlp(), make_clients([8]), Recipe(privacy=plan, **chosen))
    assert kept, "and once it is there beforehand, it is no row of theirs"
    Server(mlp(), make_clients([8]), Recipe(privacy=plan, **chosen))
