"""DP-SGD through convolutions and other first layers: each example's own gradient, clipped."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fedtorch import Client, FedAvg, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.fast.trial import offer
from fedtorch.privacy import SampleLevel, formulas
from fedtorch.training.losses import cross_entropy
from fedtorch.types import ConfigError
from tests.test_fast_front import MODELS, apart, images, trained


class Skip(nn.Module):
    """A sum in place, activations in place, one of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Conv2d(1, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)
        self.act, self.out = nn.ReLU(inplace=True), nn.Linear(4 * 16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        y = self.again(x)
        y += x
        y = nn.functional.relu(self.last(self.act(y)), inplace=True)
        return self.out(nn.functional.max_pool2d(y, 2).flatten(1))


def separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6), nn.Conv2d(6, 8, 1, padding="valid"), nn.SiLU(),
        nn.Flatten(), nn.Linear(8 * 16, 10), nn.Tanh(), nn.Linear(10, 4),
    )  # fmt: skip


class Rows(nn.Module):
    """Images as eight rows: layers with one axis of places, and linear layers among them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 6, bias=False), nn.LayerNorm(6)
        self.conv, self.out = nn.Conv1d(8, 5, 3), nn.Linear(5 * 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.linear(x.squeeze(1))))
        return self.out(torch.flatten(self.conv(x), 1))


MORE = {**MODELS, "skip": Skip, "separable": separable, "rows": Rows}


def plan(**options) -> SampleLevel:
    usual = dict(
        rounds=2, noise_multiplier=0.5, clip=0.3, batch_size=6.0, steps=4, sample_rate=0.15, insecure_seed=5
    )  # fmt: skip
    return SampleLevel(**{**usual, **options})


@pytest.mark.parametrize("strategy", [FedAvg(), FedProx(mu=0.5), Scaffold()], ids=str)
@pytest.mark.parametrize("name", MORE)
def test_steps_are_those_of_gradients_written_out_noise_and_all(name, strategy):
    # empty batches are among them: the smallest client has one example, taken with 0.15
    ends = []
    for mode, solver in (("stacked", "auto"), ("auto", "fast")):
        recipe = Recipe(strategy, lr=0.3, privacy=plan(mode=mode))
        ends.append(trained(MORE[name], recipe, solver, images(), chunk=3)[0])
    assert apart(ends[1], ends[0]) < 1e-4
    assert min(float(v.norm()) for v in ends[0].values()) > 1e-3


def test_tokens_with_padding():
    def model() -> nn.Module:
        return nn.Sequential(
            nn.Embedding(11, 6, padding_idx=0), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3)
        )

    g = torch.Generator().manual_seed(0)
    who = [
        Client(f"c{k}", (torch.randint(0, 11, (9, 5), generator=g), torch.randint(0, 3, (9,), generator=g)))
        for k in range(3)
    ]  # fmt: skip
    ends = []
    for mode, solver in (("stacked", "auto"), ("auto", "fast")):
        recipe = Recipe(lr=0.3, privacy=plan(mode=mode, sample_rate=0.5))
        ends.append(trained(model, recipe, solver, who)[0])
    assert apart(ends[1], ends[0]) < 1e-4


LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
    "conv2d": (nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)), (3, 8, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2, bias=False), (2, 4, 4, 3)),
    "depthwise": (nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4), (4, 6, 5)),
    "circular": (nn.Conv2d(2, 4, 3, stride=2, padding=1, padding_mode="circular"), (2, 7, 6)),
    "reflected": (nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 9)),
    "uneven": (nn.Conv2d(2, 3, (2, 4), padding="same"), (2, 5, 7)),
    "instance": (nn.InstanceNorm2d(3, affine=True), (3, 4, 4)),
    "linear": (nn.Linear(5, 4), (3, 2, 5)),
    "group": (nn.GroupNorm(2, 4), (4, 3, 3)),
    "layer": (nn.LayerNorm((3, 2)), (5, 3, 2)),
    "shiftless": (nn.LayerNorm(4, bias=False), (3, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_examples_are_autograds(name, last):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(5, *shape)
    if last and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    d = torch.randn_like(layer(x))
    params = {n: p.detach() for n, p in layer.named_parameters()}

    def one(params, x, d):
        return (functional_call(layer, params, (x[None],))[0] * d).sum()

    wanted = vmap(grad(one), (None, 0, 0))(params, x, d)
    found = formulas.GRADIENTS[type(layer)](layer, x, d)
    assert found.keys() == wanted.keys()
    for n, g in found.items():
        torch.testing.assert_close(g, wanted[n], rtol=1e-4, atol=1e-5)


def test_an_example_that_is_not_finite_counts_as_nothing():
    who = images()
    who[0].data.tensors[0][1:4] = float("nan")
    ends = []
    for keep in (range(21), [0, *range(4, 21)]):
        mine = [Client("c0", tuple(t[list(keep)] for t in who[0].data.tensors)), *who[1:]]
        recipe = Recipe(lr=0.3, privacy=plan(noise_multiplier=1e-6, sample_rate=1.0))
        ends.append(trained(MODELS["paper"], recipe, "fast", mine)[0])
    assert apart(*ends) < 1e-4


def test_no_example_moves_the_sum_by_more_than_the_clip():
    model = MODELS["written"]()
    for scale in (1.0, 1e4):
        ends = []
        for left in (0, 1):
            who = images([9])
            x, y = who[0].data.tensors
            x[0] *= scale
            start = copy.deepcopy(model)
            recipe = Recipe(
                lr=1.0, privacy=plan(steps=1, sample_rate=1.0, clip=0.05, noise_multiplier=1e-9)
            )
            who = [Client("c", (x[left:], y[left:]))]
            server = Server(start, who, recipe, engine=Local(solver="fast"))
            server.round()
            ends.append(torch.cat([p.detach().double().flatten() for p in start.parameters()]))
        # lr 1, divisor 6: one example is clip / 6 of the step, to what float32 leaves of weights
        assert float((ends[0] - ends[1]).norm()) == pytest.approx(0.05 / 6, rel=1e-3)


def test_a_wrong_gradient_is_found_before_training(monkeypatch):
    right = formulas.convolution

    def halved(*given):
        return {n: g / 2 for n, g in right(*given).items()}

    monkeypatch.setitem(formulas.GRADIENTS, nn.Conv2d, halved)
    who = images()
    recipe = Recipe(privacy=plan())
    why = offer(MODELS["paper"](), [c.data for c in who], recipe, recipe.privacy)
    assert "differs from the general path" in str(why)


class Alias(nn.Module):
    """Two names of one sum in place, which no fast form keeps; at first all it adds is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = (nn.Conv2d(n, 4, 3, padding=1) for n in (1, 4))
        self.norm, self.out = nn.GroupNorm(2, 4), nn.Linear(4 * 64, 4)
        nn.init.zeros_(self.norm.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        y = x
        y += self.norm(self.again(torch.tanh(x)))
        return self.out(torch.flatten(x + y, 1))


def test_zeros_at_the_end_of_branch_and_model_hide_nothing_from_the_trial():
    model, who, recipe = Alias(), images(), Recipe(privacy=plan())
    before = copy.deepcopy(model.state_dict())
    assert "differs from the general path" in str(
        offer(model, [c.data for c in who], recipe, recipe.privacy)
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("layer", "options", "why"),
    [
        (nn.ConvTranspose2d(1, 4, 3, padding=1), {}, "layer 0: ConvTranspose2d has no formula"),
        (nn.Conv2d(1, 4, 3, padding=1), {"projected": True}, "takes the examples themselves"),
    ],
)  # fmt: skip
def test_what_has_no_private_form_is_named(layer, options, why, monkeypatch):
    monkeypatch.delitem(formulas.GRADIENTS, nn.ConvTranspose2d)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 4))
    recipe = Recipe(privacy=plan(**options))
    with pytest.raises(ConfigError, match=why):
        Server(model, images(), recipe, engine=Local(solver="fast"))


def test_gradients_that_would_not_fit_are_not_written_out(monkeypatch):
    monkeypatch.setattr("fedtorch.fast.example_gradients.GRADIENTS_WRITTEN", 100)
    recipe = Recipe(loss=cross_entropy, privacy=plan())
    with pytest.raises(ConfigError, match=r"gradients of 6 examples .* too much memory"):
        Server(MODELS["paper"](), images(), recipe, engine=Local(solver="fast"))
