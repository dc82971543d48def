import copy
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset, TensorDataset

from conftest import make_clients, mlp, weights
from fedtorch import Client, ClientOptimizer, ConfigError, Local, Recipe, Server
from fedtorch.checks.probe import classes_fit, fits, metrics_fit, mixes_examples, no_stacking
from fedtorch.data import from_tensors
from fedtorch.privacy import ClientLevel, SampleLevel
from fedtorch.strategies import FedProx
from fedtorch.training.losses import accuracy, binary_accuracy, cross_entropy, mean_squared_error


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # control flow on data: torch.func cannot follow it
            return self.inner(x)
        return -self.inner(x)


@pytest.mark.parametrize(
    "model, recipe, message",
    [
        (nn.Linear(5, 4), Recipe(), r"model Linear cannot take a batch \[5, 6\]"),
        (nn.Flatten(), Recipe(), "no trainable parameters"),
        (nn.Linear(6, 4).requires_grad_(False), Recipe(), "no trainable parameters"),
        (nn.Linear(6, 4, dtype=torch.complex64), Recipe(), "complex parameters"),
        (nn.LazyLinear(4), Recipe(), "lazy layers"),
        (nn.Linear(6, 2), Recipe(loss=mean_squared_error), "one output for each target"),
        (nn.Linear(6, 4), Recipe(loss=lambda o, t: t.float()), "does not depend on the parameters"),
        (nn.Linear(6, 4), Recipe(loss=lambda o, t: o.sum(0)), "one number for each example"),
        (
            nn.Linear(6, 4),
            Recipe(loss=lambda o, t: o.nothing),
            "the loss does not fit model Linear",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_training(model, recipe, message):
    with pytest.raises(ConfigError, match=message):
        fits(model, make_clients([5]), recipe)


def test_numbers_of_a_vocabulary_are_told_where_a_model_takes_amounts():
    for x, fix in ((torch.ones(5, 6).long(), True), (torch.ones(5, 7), False)):
        who = [Client("c", (x, torch.arange(5) % 4))]
        with pytest.raises(ConfigError, match="cannot take a batch") as e:
            fits(nn.Linear(6, 4), who, Recipe())
        assert ("amounts must be float32" in str(e.value)) is fix


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


@pytest.mark.parametrize(
    "sizes, order, message",
    [
        ([32, 33], {"batch_size": 16}, r"client c1 .* \(33 .*, batch_size 16\), .*drop_last"),
        ([33, 17], {"batch_size": 16}, "client c0 .*, as have 1 more"),
        ([32, 1], {"batch_size": 16, "drop_last": True}, "client c1 .*: leave that client out"),
        ([33, 32], {"batch_size": 16, "steps": 3}, "client c0 .*drop_last"),
        ([8, 8], {"batch_size": 1}, "client c0 .*: take a larger batch_size"),
    ],
)
def test_a_batch_of_one_that_cannot_train_is_refused_before_training(sizes, order, message):
    for solver in ("auto", "general"):
        with pytest.raises(ConfigError, match=message):
            Server(normed(), make_clients(sizes), Recipe(**order), engine=Local(solver=solver))
    Server(mlp(), make_clients(sizes), Recipe(**order)).round()  # without BatchNorm it trains


def test_a_batch_of_one_that_never_comes_is_no_mistake():
    for order in ({"drop_last": True}, {"steps": 2}):
        server = Server(normed(), make_clients([33, 20]), Recipe(batch_size=16, **order))
        assert server.round()["clients"] == 2


def test_a_loss_that_gives_no_number_for_one_example_is_refused_too():
    def paired(output, y):
        return (output[1:] - output[:-1]).square().sum(1).max()

    with pytest.raises(ConfigError, match="client c1 has a batch of one example"):
        Server(mlp(), make_clients([8, 9]), Recipe(loss=paired, batch_size=8))


def events(output, y):
    """A mean over those who had the event, as Cox's: nobody may have had it."""
    had = y > 0
    return (output[:, 0] * had).sum() / had.sum()


@pytest.mark.parametrize("plan", [None, ClientLevel(rounds=1)], ids=["plain", "private"])
def test_a_loss_that_is_no_number_for_a_short_batch_is_refused_before_training(plan):
    clients, recipe = make_clients([16, 17, 33, 16, 16]), Recipe(loss=events, privacy=plan)
    for c in clients:
        c.data.tensors[1].copy_(torch.arange(len(c)) % 2)
    lone = r"client c1 has a batch of one .* as have 1 more, .*\(the loss is nan, which it is not for 16\)"
    with pytest.raises(ConfigError, match=lone):
        Server(mlp(), clients, recipe)
    Server(mlp(), [clients[k] for k in (0, 3, 4)], recipe)
    clients[1].data.tensors[0][0] = math.nan  # which is no matter of sizes
    Server(mlp(), clients[1:2], Recipe())


@pytest.mark.parametrize("solver", ["general", "stacked"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.complex64, torch.float32])
def test_a_buffer_that_changes_and_is_not_averaged_is_named(dtype, solver):
    class Seen(nn.Sequential):
        def forward(self, x):
            self.seen.copy_(self.seen + x.new_ones(()).to(dtype))
            return super().forward(x)

    model = Seen(*mlp(), nn.BatchNorm1d(4))
    model.register_buffer("seen", torch.zeros((), dtype=dtype))
    model.register_buffer("constant", torch.ones(3, dtype=torch.bool))
    server = Server(model, make_clients([8, 8]), engine=Local(solver=solver))
    named = [n for n in server.notes if "is not averaged" in n]
    server.round()
    assert bool(model.seen) == (dtype == torch.float32)
    kind = str(dtype).removeprefix("torch.")
    assert [n.startswith(f"buffer seen ({kind}) changes") for n in named] == [True] * (
        dtype != torch.float32
    )


@pytest.mark.parametrize("plan", [None, SampleLevel(rounds=1)], ids=["plain", "private"])
def test_a_loss_that_drops_the_axis_of_a_batch_of_one_is_told_how_not_to(plan):
    def careless(z, y):
        return F.binary_cross_entropy_with_logits(z.squeeze(), y.float(), reduction="none")

    clients = make_clients([9, 9], classes=2)
    with pytest.raises(ConfigError, match=r"one.* squeeze\(-1\)"):
        Server(mlp(classes=1), clients, Recipe(loss=careless, privacy=plan, batch_size=8))


def test_a_loss_that_only_records_is_told_where_to():
    seen = []

    def recording(z, y):
        seen.append(float(z.detach().mean()))
        return cross_entropy(z, y)

    with pytest.raises(
        ConfigError, match=r"\(seen\).* to be looked at, let a metric or an observer"
    ):
        Server(mlp(), make_clients([9]), Recipe(loss=recording))


def test_an_optimizer_that_steps_on_rounding_is_named_as_the_reason():
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)]
    recipe = Recipe(optimizer=ClientOptimizer("Adam"), lr=0.01, batch_size=6)
    server = Server(nn.Sequential(*layers), make_clients([12, 12]), recipe)
    assert any("optimizer Adam makes steps of what is only rounding" in n for n in server.notes)


def test_every_size_of_batch_that_comes_is_tried():
    class Odd(nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(2, -1, 6).flatten(0, 1) if len(x) == 5 else x)

    Server(Odd(*mlp()), make_clients([8, 10, 11]), Recipe(batch_size=8))
    with pytest.raises(ConfigError, match=r"client c2 has a batch of 5 examples \(13 .*so few"):
        Server(Odd(*mlp()), make_clients([8, 10, 13]), Recipe(batch_size=8))


def test_a_trial_leaves_weights_gradients_and_generators_as_they_were():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before, state = weights(model), torch.get_rng_state()
    fits(model, make_clients([5]), Recipe())
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def named(labels: torch.Tensor, classes: int):
    x = torch.randn(len(labels), 6)
    return from_tensors("d", (x, labels), (x, labels), "classification", classes)


@pytest.mark.parametrize(
    "outputs, labels, classes, message",
    [
        (3, [0, 1, 2, 3], 4, "4 classes: it needs an output of 4"),
        (4, [1, 2, 3, 4], 4, "its labels go from 1 to 4: they must be 0 to 3"),
        (4, [-1, 0, 1, 2], 4, "its labels go from -1 to 2"),
    ],
)
def test_labels_and_outputs_must_fit(outputs, labels, classes, message):
    x, y = torch.randn(4, 6), torch.tensor(labels)
    with pytest.raises(ConfigError, match=message):
        classes_fit(mlp(classes=outputs), TensorDataset(x, y), y, classes)


@pytest.mark.parametrize("classes", [3, 8, 12])
def test_the_classes_of_a_segmentation_are_on_axis_1_not_in_its_width(classes):
    x, y = torch.randn(4, 1, 8, 8), torch.randint(0, classes, (4, 8, 8))
    maps = TensorDataset(x, y)
    classes_fit(torch.nn.Conv2d(1, classes, 1), maps, None, classes)
    with pytest.raises(
        ConfigError, match=f"needs an output of {classes} for each example, on axis 1"
    ):
        classes_fit(torch.nn.Conv2d(1, classes - 1, 1), maps, None, classes)


def test_metrics_are_tried_too():
    data = named(torch.tensor([0, 1]), 4)
    metrics_fit(mlp(), data.test, {"accuracy": accuracy})
    with pytest.raises(ConfigError, match="one output for each target"):
        metrics_fit(mlp(), data.test, {"binary": binary_accuracy})
    with pytest.raises(ConfigError, match="metric odd does not fit the output"):
        metrics_fit(mlp(), data.test, {"odd": lambda o, t: o @ t})


def test_metrics_that_only_the_whole_set_can_try_are_named():
    data = named(torch.arange(9) % 4, 4)

    def one_class(output, target):
        raise ValueError("only one class is there")

    metrics = {"accuracy": accuracy, "mean": lambda o, t: 1.0, "auc": one_class}
    assert set(metrics_fit(mlp(), data.test, metrics)) == {"mean", "auc"}
    for length in (2, 3):  # as many as examples were tried, by chance
        with pytest.raises(ConfigError, match="metric recall must give one number for each"):
            metrics_fit(mlp(), data.test, {"recall": lambda o, t, n=length: torch.zeros(n)})


def stacks(model: nn.Module, recipe: Recipe | None = None) -> str | None:
    return no_stacking(model, make_clients([5, 6]), recipe or Recipe())


def test_modules_that_vmap_can_follow_stack():
    assert stacks(mlp()) is None
    assert stacks(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))) is None


def test_what_cannot_stack_is_named_by_layer_and_falls_back():
    why = stacks(nn.Sequential(nn.Linear(6, 6), Raises()))
    assert why is not None
    assert why.startswith("layer 1 (Raises) cannot be vectorised")
    adafactor = Recipe(optimizer=ClientOptimizer("Adafactor"))
    assert stacks(mlp(), adafactor) == "optimizer Adafactor does not work element by element"
    server = Server(Raises(), make_clients([5, 6]), engine=Local(chunk=2))
    assert server.session.choice.chunk == 1
    assert "layer the model (Raises) cannot be vectorised" in " ".join(server.session.notes)
    assert server.round()["clients"] == 2


def test_an_lstm_trains_one_client_after_another_and_says_so():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 8, batch_first=True)
            self.head = nn.Linear(8, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(self.embed(x))[0]).transpose(1, 2)

    clients = [Client(str(k), (torch.arange(40).view(5, 8) % 9,) * 2) for k in range(3)]
    server = Server(Reader(), clients, Recipe(lr=1.0), engine=Local(chunk=3))
    assert "layer lstm (LSTM) cannot be vectorised" in " ".join(server.session.notes)
    losses = [figures["train_loss"] for figures in server.rounds(3)]
    assert losses[-1] < losses[0]


def test_examples_of_clients_with_different_shapes_do_not_stack():
    clients = [Client(str(k), (torch.zeros(4, 3 + k), torch.zeros(4).long())) for k in range(2)]
    assert "differ in shape" in str(no_stacking(nn.Linear(3, 4), clients, Recipe()))


class Called(nn.Module):
    """Dropout as functions, one of them always on, and inside of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm = nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5), nn.BatchNorm1d(4)
        self.mix = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rnn(F.dropout(x, training=self.training).view(-1, 2, 3))[0][:, -1]
        x = torch.dropout(F.alpha_dropout(x, 0.3, True), 0.2, True)
        return self.norm(x) if self.mix else x


def test_dropout_is_not_taken_for_mixing_and_does_not_hide_it():
    data, model = make_clients([9])[0].data, Called()
    assert not mixes_examples(model, data, Recipe())
    model.mix = True
    assert mixes_examples(model, data, Recipe())
    assert all(m.training for m in model.modules())


def test_batchnorm_and_whole_batch_losses_mix_examples():
    data = make_clients([9])[0].data
    assert not mixes_examples(nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)), data, Recipe())
    assert not mixes_examples(nn.Sequential(nn.Linear(6, 4), nn.GroupNorm(2, 4)), data, Recipe())
    assert mixes_examples(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), data, Recipe())
    assert mixes_examples(mlp(), data, Recipe(loss=nn.CrossEntropyLoss()))

    def contrast(output, y):  # a number for each example, but of its neighbours
        return cross_entropy(output, y) - torch.logsumexp(output, 0).mean()

    def shared(output, y):
        return cross_entropy(output, y) / len(y)

    for loss in (contrast, shared):
        assert mixes_examples(mlp(), data, Recipe(loss=loss))

    class Largest(nn.Module):  # a neighbour that is there twice does not show
        def forward(self, x):
            return x / x.abs().max()

    assert mixes_examples(nn.Sequential(Largest(), nn.Linear(6, 4)), data, Recipe())


class Heads(nn.Module):
    """Two outputs and a constant, as a tuple, a dict or a named tuple."""

    def __init__(self, kind: object) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.Linear(6, 4), nn.Linear(6, 4), kind

    def forward(self, x: torch.Tensor) -> object:
        parts = {"a": self.a(x), "b": self.b(x), "scale": torch.ones(2)}
        return parts if self.kind is dict else self.kind(parts.values())


Pair = namedtuple("Pair", "a b scale")


@pytest.mark.parametrize("kind", [tuple, list, dict, Pair._make])
@pytest.mark.parametrize("solver", ["auto", "stacked", "general"])
def test_outputs_of_several_parts_train_with_a_loss_that_knows_them(kind, solver):
    def loss(output, target):
        a, b, _ = output.values() if isinstance(output, dict) else output
        return F.cross_entropy(a, target, reduction="none") + F.cross_entropy(
            b, target, reduction="none"
        )

    torch.manual_seed(0)
    model, clients = Heads(kind), make_clients([6, 6])
    losses = []
    for private in (None, SampleLevel(noise_multiplier=1.0, rounds=1, batch_size=3)):
        recipe = Recipe(loss=loss, privacy=private)
        figures = Server(copy.deepcopy(model), clients, recipe, engine=Local(solver=solver)).round()
        losses.append(figures["clients"])
    assert losses == [2, 2]
    assert not mixes_examples(model, clients[0].data, Recipe(loss=loss))
    assert mixes_examples(
        model, clients[0].data, Recipe(loss=lambda o, t: loss(o, t) + 0 * t + loss(o, t).mean())
    )


def test_metrics_may_look_at_an_output_that_is_a_view_of_a_weight():
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return self.w.expand(len(x), 4)

    data = named(torch.tensor([0, 1]), 4)
    metrics_fit(Bias(), data.test, {"loss": cross_entropy})


def test_an_evaluation_that_fails_is_refused_before_training():
    class Forgets(nn.Linear):
        def forward(self, x):
            return super().forward(x) if self.training else self.table[x]

    with pytest.raises(ConfigError, match=r"cannot take a batch .* in evaluation"):
        metrics_fit(Forgets(6, 4), named(torch.tensor([0, 1]), 4).test, {"loss": cross_entropy})


class OnlyFour(nn.Linear):
    def forward(self, x):
        if len(x) % 4:
            raise KeyError("rows")
        return super().forward(x)


def test_the_short_last_batch_is_tried_too():
    clients = make_clients([8, 8])
    fits(OnlyFour(6, 4), clients, Recipe(batch_size=4))
    with pytest.raises(ConfigError, match=r"cannot take a batch \[2, 6\]: 'rows'"):
        Server(OnlyFour(6, 4), make_clients([8, 6]), Recipe(batch_size=4))


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise AttributeError("nothing")


@pytest.mark.parametrize("sparse", [True, False])
def test_a_real_step_is_tried(sparse):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 4))
    data = Client("a", (torch.randint(0, 9, (6, 3)), torch.randint(0, 4, (6,))))
    for recipe in (Recipe(optimizer=ClientOptimizer("Adam")), Recipe(strategy=FedProx(mu=0.1))):
        if sparse:
            with pytest.raises(
                ConfigError, match=r"cannot take a step.*sparse, leave out sparse=True"
            ):
                Server(model, [data], recipe)
        else:
            assert Server(model, [data], recipe).round()["clients"] == 1
    assert Server(model, [data]).round()["clients"] == 1


def test_a_backward_that_fails_is_refused_before_training():
    class Fails(nn.Linear):
        def forward(self, x):
            return Broken.apply(super().forward(x))

    with pytest.raises(ConfigError, match="the loss of model Fails has no gradient: nothing"):
        Server(Fails(6, 4), make_clients([5]))


def test_a_sparse_buffer_is_refused_by_name():
    model = nn.Linear(6, 4)
    model.register_buffer("extra", torch.eye(4).to_sparse())
    with pytest.raises(ConfigError, match="extra of model Linear is sparse"):
        Server(model, make_clients([5]))


class Experts(nn.Module):
    """Each example goes to one of three experts alone."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, 4) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        share, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero().flatten()
            if len(mine):
                out = out.index_add(0, mine, share[mine, None] * expert(x[mine]))
        return out


def sample() -> SampleLevel:
    return SampleLevel(
        noise_multiplier=1e-9, rounds=1, steps=1, sample_rate=1.0, batch_size=8, clip=0.1
    )


def test_a_mixture_of_experts_trains_privately_example_by_example():
    torch.manual_seed(0)
    model, (client,) = Experts(), make_clients([8])
    start = copy.deepcopy(model)
    server = Server(model, [client], Recipe(privacy=sample(), lr=1.0))
    assert any("example after example" in note for note in server.notes)
    server.round()
    x, y = client.data.tensors
    total = [torch.zeros_like(p) for p in start.parameters()]
    for k in range(8):
        start.zero_grad()
        F.cross_entropy(start(x[k : k + 1]), y[k : k + 1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in start.parameters()]
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        total = [t + g * min(1.0, 0.1 / float(norm)) for t, g in zip(total, grads, strict=True)]
    for old, new, t in zip(start.parameters(), model.parameters(), total, strict=True):
        torch.testing.assert_close(new, old - t / 8, rtol=1e-4, atol=1e-6)


def test_layers_that_draw_are_refused_for_what_they_do():
    class Noisy(nn.Linear):
        def forward(self, x):
            own = torch.Generator().manual_seed(torch.initial_seed())
            return super().forward(x + torch.randn(x.shape, generator=own))

    with pytest.raises(ConfigError, match="draws random numbers that no trial can hold still"):
        Server(Noisy(6, 4), make_clients([8]), Recipe(privacy=sample()))


def test_a_parameter_without_a_part_in_the_loss_is_named():
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.extra = nn.Linear(2, 2)

    model = Spare()
    with pytest.raises(ConfigError, match=r"extra\.weight has no part in the loss of any example"):
        Server(model, make_clients([8]), Recipe(privacy=sample()))


@pytest.mark.parametrize("kind", [dict, tuple])
def test_labels_of_several_parts_train_privately(kind):
    x, a, b = torch.randn(8, 6), torch.randint(0, 4, (8,)), torch.rand(8)
    y = StackDataset(a=a, b=b) if kind is dict else StackDataset(a, b)

    def loss(output, target):
        first, second = target.values() if isinstance(target, dict) else target
        return F.cross_entropy(output, first, reduction="none") + (output[:, 0] - second) ** 2

    server = Server(mlp(), [Client("a", StackDataset(x, y))], Recipe(loss=loss, privacy=sample()))
    assert len(server.round()["cohort"]) == 1


def test_a_training_step_of_the_models_own_is_said_to_be_ignored():
    class Lit(nn.Linear):
        def training_step(self, batch, index):
            raise AssertionError

        def configure_optimizers(self):
            raise AssertionError

    server = Server(Lit(6, 4), make_clients([8]))
    said = "training_step and configure_optimizers of model Lit are not used"
    assert any(note.startswith(said) for note in server.notes)
    assert not any("training_step" in n for n in Server(mlp(), make_clients([8])).notes)
    own = Recipe(step=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    assert not any("training_step" in n for n in Server(Lit(6, 4), make_clients([8]), own).notes)


def test_what_holds_the_model_handed_over_is_refused():
    class Keeps(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.call = lambda x: F.linear(x, self.weight, self.bias)

        def forward(self, x):
            return self.call(x)

    model = Keeps()
    with pytest.raises(ConfigError, match=r"uses parameter weight of the very model handed over"):
        Server(model, make_clients([5]))
    assert model.weight.grad is None
    plain = mlp()

    def loss(output, target):
        return cross_entropy(output, target) + plain[0].weight.square().sum()

    with pytest.raises(
        ConfigError, match=r"the loss or step, .* uses parameter 0\.weight of the very model"
    ):
        Server(plain, make_clients([5]), Recipe(loss=loss))


def test_a_buffer_that_forward_replaces_is_read_without_a_trace():
    class Follows(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            return super().forward(x - self.mean)

    model = Follows()
    assert Server(model, make_clients([5, 5, 5])).round()["clients"] == 3
    assert bool(model.mean.any())


def test_a_model_without_numbers_is_refused():
    with pytest.raises(ConfigError, match="weight of model Linear is on device meta"):
        Server(nn.Linear(6, 4, device="meta"), make_clients([5]))


def test_an_optimizer_of_matrices_trains_a_model_of_matrices_and_is_refused_elsewhere():
    muon = Recipe(optimizer=ClientOptimizer("muon"))
    assert Server(nn.Linear(6, 4, bias=False), make_clients([5]), muon).round()["clients"] == 1
    with pytest.raises(ConfigError, match="client optimizer muon cannot train model Linear"):
        Server(nn.Linear(6, 4), make_clients([5]), muon)


def test_a_command_trains_and_pictures_a_model_of_several_outputs(fedtorch):
    Path("models").mkdir()
    Path("models/two.py").write_text(
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self, in_features: int):\n"
        "        super().__init__(); self.a = nn.Linear(in_features, 10)\n"
        "    def forward(self, x):\n"
        "        x = self.a(x.flatten(1)); return x, 2 * x\n"
    )
    Path("own_loss.py").write_text(
        "import torch.nn.functional as F\n"
        "def both(o, y): return F.cross_entropy(o[0] + o[1], y, reduction='none')\n"
    )
    code, _, err = fedtorch(
        "train", "--model", "two", "--loss", "own_loss:both", "--metrics", "own_loss:both",
        "--privacy", "none", "--rounds", 1, "--clients", 3, "--run-dir", "run",
    )  # fmt: skip
    assert (code, err) == (0, "")
    np.save("x.npy", np.eye(3, 64, dtype=np.float32).reshape(3, 1, 8, 8))
    code, out, _ = fedtorch("predict", "run", "x.npy", "--json", "--trust-code")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 3
    assert all(r["prediction"]["0"] == r["prediction"]["1"] in range(10) for r in rows)
    assert all(r["probability"]["0"] < r["probability"]["1"] for r in rows)
