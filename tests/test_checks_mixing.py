"""Losses and models in which examples reach others: each kind is refused before anything trains."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch import Client, ConfigError, Local, Recipe
from fedtorch.checks.mixing import mixes
from fedtorch.privacy import SampleLevel
from fedtorch.training.losses import cross_entropy

X, Y = torch.rand(16, 6, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def found(loss=cross_entropy, model: nn.Module | None = None, **plan) -> str | None:
    recipe = Recipe(loss=loss, privacy=SampleLevel(rounds=1, **plan))
    return mixes(model or net(), (X, Y), recipe)


def same_class(z, y, weight=1.0):
    near = (y[:, None] == y[None]).to(z) - torch.eye(len(y)).to(z)
    return cross_entropy(z, y) + weight * (near * torch.cdist(z, z).square()).sum(1)


def little(z, y):
    return same_class(z, y, 1e-5)


def when_large(z, y):
    return cross_entropy(z, y) + (z.detach().abs().amax(1) > 50) * z.mean()


def when_many(z, y):
    return cross_entropy(z, y) + (z.mean() if len(y) > 40 else 0.0)


def balanced(z, y):
    return cross_entropy(z, y) / (y[:, None] == y[None]).sum(1)


def others_labels(z, y):
    return cross_entropy(z, y) * (1 + 0.1 * y.to(z).mean())


def by_rank(z, y):
    each = cross_entropy(z, y)
    return each * (each >= each.median())


def gradient_alone(z, y):
    # the values are those of each example, the gradient is not
    return cross_entropy(z, y) + z.sum() - z.sum().detach()


def crowded(z, y, most=250):
    # nobody meets anybody until there are many of one class
    near = (y[:, None] == y[None]).to(z)
    return cross_entropy(z, y) + (near.sum(1) > most) * (near @ z).mean(1)


def very_crowded(z, y):
    return crowded(z, y, 1500)


def one_class(z, y):
    # a class that made-up labels may not have
    return cross_entropy(z, y) + (y == 2) * z[y == 2].sum()


def gradient_of_many(z, y):
    return cross_entropy(z, y) + (gradient_alone(z, y) - cross_entropy(z, y)) * (len(y) > 300)


class Queue(nn.Module):
    """Keeps what it has seen, as contrastive learning with a memory does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, z, y):
        far = (
            torch.stack([torch.cdist(z, k).amin(1) for k in self.kept]).amin(0) if self.kept else 0
        )
        self.kept = [*self.kept[-2:], z.detach()]
        return cross_entropy(z, y) + far


class Average:
    """An exponential average that weighs losses to come."""

    mean = 1.0

    def __call__(self, z, y):
        each = cross_entropy(z, y) / self.mean
        self.mean = 0.9 * self.mean + 0.1 * float(each.mean())
        return each


class Remembered:
    """What a large batch was like, for those to come: within a batch nobody meets anybody."""

    kept = 0.0

    def __call__(self, z, y):
        each = cross_entropy(z, y) + self.kept
        if len(y) > 40:
            self.kept = float(each.mean())
        return each


MIXED = [
    same_class, little, when_large, when_many, balanced, others_labels, by_rank, gradient_alone, Queue(),
    Average(), crowded, very_crowded, one_class, gradient_of_many,
]  # fmt: skip


@pytest.mark.parametrize("loss", MIXED, ids=lambda m: getattr(m, "__name__", type(m).__name__))
def test_losses_that_mix_examples_are_found(loss):
    assert found(loss)


class Normed(nn.Module):
    """By hand what BatchNorm does: without buffers, so that none gives it away."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.inner, self.head = how, nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.inner(x)
        if self.how == "function":
            h = F.batch_norm(h, None, None, training=True) if len(h) > 1 else h
        elif self.how == "by hand":
            h = h - h.mean(0)
        elif self.how == "large":
            h = torch.where(h.abs().amax() > 100, h - h.mean(0), h)
        elif self.how == "attention":
            h = h + 0.1 * torch.softmax(h @ h.T, 1) @ h
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("how", ["function", "by hand", "large", "attention"])
def test_models_that_mix_examples_are_found(how):
    assert found(model=Normed(how))


def annealed():
    calls = []

    def loss(z, y):
        calls.append(None)
        return cross_entropy(z, y) / len(calls)

    return loss


class Weighted(nn.Module):
    """A buffer in float32, which keeps the trial in that type."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, z, y):
        return F.cross_entropy(z, y, self.weight, reduction="none")


def probabilities(z, y):
    return F.binary_cross_entropy(z.softmax(1)[:, 0], y.to(z), reduction="none")


def strict_probabilities(p, y):
    return F.binary_cross_entropy(p[:, 0], y.to(p), reduction="none")


@pytest.mark.parametrize("loss", [cross_entropy, Weighted(), probabilities])
def test_losses_of_single_examples_pass(loss):
    assert found(loss) is None
    assert found(loss, Normed("none"), batch_size=200.0) is None


def test_a_loss_of_probabilities_is_tried_on_probabilities():
    assert found(strict_probabilities, nn.Sequential(net(), nn.Softmax(1))) is None


def test_what_else_a_model_puts_out_is_nobodys_row():
    class Both(nn.Linear):
        def forward(self, x):
            return {"z": super().forward(x), "bias": self.bias, "scale": self.bias.sum()}

    def kept_small(out, y):
        return cross_entropy(out["z"], y) + 0.1 * out["bias"].square().sum() + out["scale"]

    assert found(kept_small, Both(6, 3)) is None


def test_gradients_that_mix_where_inputs_are_large_are_found():
    class Large(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            some = (z / 1e3).tanh()  # the values are those of each example, the gradient is not
            some = (some - some.detach()).sum() * (x.abs().max() > 20)
            return z + some * torch.tensor([1.0, 0.0, 0.0]).to(z)

    torch.manual_seed(0)
    assert found(model=Large(6, 3)) == "an example's gradient depends on its neighbours"


def test_a_model_that_changes_its_weights_where_inputs_are_large_is_found():
    class Moving(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                self.bias += 1e-9 * (x.abs().max() > 100)
            return super().forward(x)

    assert found(model=Moving(6, 3)) == "bias is changed past clipping and noise"


def test_a_loss_that_depends_on_batches_before_is_found():
    assert found(Remembered()) == "a loss depends on batches before"


def test_a_loss_module_may_keep_state_and_a_function_may_not():
    # a class, whose copies start anew; a function that counts keeps on counting, and is refused
    class Warmup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.ones(())

        def forward(self, z, y):
            return self.scale * cross_entropy(z, y)

    assert found(Warmup()) is None
    assert found(annealed())


def test_a_trial_leaves_loss_and_model_as_they_were():
    loss, model = Queue(), net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found(cross_entropy, model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not loss.kept


@pytest.mark.parametrize("mode", ["auto", "hooks", "ghost", "stacked"])
def test_what_mixes_is_refused_in_every_privacy_mode_before_training(mode):
    recipe = Recipe(loss=same_class, privacy=SampleLevel(rounds=1, mode=mode))
    with pytest.raises(ConfigError, match="mixes the examples"):
        Local().open(net(), [Client("c", (X, Y))], recipe)


class Odd(nn.Module):
    """Does ``fn`` to what its first layer puts out."""

    def __init__(self, fn) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.fn = nn.Linear(6, 5), nn.Linear(5, 3), fn

    def forward(self, x):
        return self.last(torch.tanh(self.fn(self.first(x))))


def beside_zeros(h):
    """What the first layer gives for zeros is its bias."""
    zeros = (h == Odd(None).first.bias.to(h)).all(1)
    return torch.where(zeros.any(), h - h.mean(0), h)


class Centred(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, d):
        return d - d.mean(0) if len(d) > 30 else d


@pytest.mark.parametrize(
    "fn",
    [
        lambda h: h - h.mean(0) if len(h) > 400 else h,
        lambda h: torch.where((h < -9).any(), 2 * h, h),
        beside_zeros,
        lambda h: torch.where((h > 300).any() & (h.abs() < 3), 0 * h, h),
        Centred.apply,
    ],
    ids=[
        "in the largest batches",
        "beside a negative one",
        "beside zeros",
        "beside a large one",
        "gradients",
    ],
)
def test_a_model_that_mixes_only_beside_rows_of_another_kind_is_found(fn):
    assert found(model=Odd(fn)) is not None
    assert found(model=Odd(lambda h: h)) is None


def test_a_loss_is_tried_on_a_copy():
    class Counted(nn.Module):
        calls = 0

        def forward(self, z, y):
            self.calls += 1
            return cross_entropy(z, y)

    loss = Counted()
    assert found(loss) is None and loss.calls == 0


def test_a_model_that_takes_gradients_in_its_forward_is_refused_in_one_sentence():
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            return self.net(x) + slope[:, :3]

    with pytest.raises(
        ConfigError, match=r"model Slope and its loss .* gradients in its own forward"
    ):
        found(model=Slope())


def test_numbers_that_are_told_by_which_others_there_are_are_found():
    class Numbered(nn.Module):
        def __init__(self, together: bool) -> None:
            super().__init__()
            self.together, self.words, self.head = together, nn.Embedding(9, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.unique(x, return_inverse=True)[1] if self.together else x
            return self.head(self.words(x).mean(1))

    x = torch.arange(6).repeat(16, 1) % 2  # as examples are made up
    for together in (True, False):
        torch.manual_seed(0)
        why = mixes(Numbered(together), (x, Y), Recipe(privacy=SampleLevel(rounds=1)))
        assert bool(why) == together
