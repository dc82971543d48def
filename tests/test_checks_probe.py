import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import StackDataset

from conftest import make_clients, mlp, weights
from fedtorch import Client, ClientOptimizer, ConfigError, Local, Recipe, Server
from fedtorch.checks.probe import fits
from fedtorch.checks.trial import evenly
from fedtorch.strategies import FedProx
from fedtorch.training.losses import cross_entropy, mean_squared_error


@pytest.mark.parametrize(
    "model, recipe, message",
    [
        (nn.Linear(5, 4), Recipe(), r"model Linear cannot take a batch \[5, 6\]"),
        (nn.Flatten(), Recipe(), "no trainable parameters"),
        (nn.Linear(6, 4).requires_grad_(False), Recipe(), "no trainable parameters"),
        (
            nn.Linear(6, 4, dtype=torch.complex64),
            Recipe(),
            r"complex par.* \(torch\.view_as_complex\)",
        ),
        (
            nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)),
            Recipe(loss=nn.BCEWithLogitsLoss(reduction="none")),
            r"does not fit .* the labels are int64, .*: y\.float\(\)",
        ),
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


def test_a_model_of_rows_that_is_given_pictures_is_told_to_flatten_them():
    who = [Client("c", (torch.ones(5, 1, 2, 3), torch.arange(5) % 4))]
    for model, fix in ((nn.Linear(6, 4), True), (nn.Linear(7, 4), False)):
        with pytest.raises(ConfigError, match="cannot take a batch") as e:
            fits(model, who, Recipe())
        assert ("put nn.Flatten() before its first layer" in str(e.value)) is fix


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


def test_a_loss_that_only_records_is_told_where_to():
    seen = []

    def recording(z, y):
        seen.append(float(z.detach().mean()))
        return cross_entropy(z, y)

    with pytest.raises(
        ConfigError, match=r"\(seen\).* to be looked at, let a metric or an observer"
    ):
        Server(mlp(), make_clients([9]), Recipe(loss=recording))


def test_a_trial_leaves_weights_gradients_and_generators_as_they_were():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before, state = weights(model), torch.get_rng_state()
    fits(model, make_clients([5]), Recipe())
    assert all(torch.equal(before[k], v) for k, v in weights(model).items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


class OnlyFour(nn.Linear):
    def forward(self, x):
        if len(x) % 4:
            raise KeyError("rows")
        return super().forward(x)


def test_the_short_last_batch_is_tried_too():
    clients = make_clients([8, 8])
    fits(OnlyFour(6, 4), clients, Recipe(batch_size=4))
    with pytest.raises(ConfigError, match=r"cannot take a batch \[2, 6\] of client c1: 'rows'"):
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


def test_an_optimizer_of_matrices_trains_a_model_of_matrices_and_is_refused_elsewhere():
    muon = Recipe(optimizer=ClientOptimizer("muon"))
    assert Server(nn.Linear(6, 4, bias=False), make_clients([5]), muon).round()["clients"] == 1
    with pytest.raises(ConfigError, match="client optimizer muon cannot train model Linear"):
        Server(nn.Linear(6, 4), make_clients([5]), muon)


@pytest.mark.parametrize(
    "other, message",
    [
        ((torch.randn(9, 5), torch.zeros(9, dtype=torch.int64)), r"\[9, 5\] of client odd"),
        (
            (torch.randn(9, 6).double(), torch.zeros(9, dtype=torch.int64)),
            "odd: .* give the data as float32",
        ),
        ((torch.randn(9, 6), torch.zeros(9)), "labels are float32, and classes must be int64"),
        ((torch.randn(9, 6), torch.zeros(9) > 0), "labels are bool, and classes must be int64"),
    ],
)
def test_a_later_client_of_other_types_or_shapes_is_named_before_training(other, message):
    clients = [*make_clients([20, 30]), Client("odd", other)]
    with pytest.raises(ConfigError, match=message):
        fits(nn.Linear(6, 4), clients, Recipe())


def test_rows_that_are_tried_are_spread_from_the_first_to_the_last():
    assert evenly(9, 4).tolist() == [0, 2, 5, 8]
    assert evenly(3, 9).tolist() == [0, 1, 2]


def test_parts_of_an_input_that_a_forward_takes_otherwise_are_told_how_they_go_in():
    class Whole(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"] * batch["seen"])

    x = torch.ones(5, 6)
    data = StackDataset(StackDataset(x=x, seen=x > 0), torch.arange(5) % 4)
    with pytest.raises(ConfigError, match=r"a dict goes into forward by its names, .*step=fn\)$"):
        fits(Whole(6, 4), [Client("c", data)], Recipe())


def test_a_loss_or_step_that_is_called_otherwise_is_told_how():
    def swapped(target, output):
        return F.cross_entropy(output, target, reduction="none")

    def three(output, target, weight):
        return output

    for loss in (swapped, three):
        with pytest.raises(ConfigError, match=r"it is called as loss\(output, target\)$"):
            fits(nn.Linear(6, 4), make_clients([5]), Recipe(loss=loss))
    with pytest.raises(ConfigError, match=r"it is called as fn\(model, batch\)"):
        fits(nn.Linear(6, 4), make_clients([5]), Recipe(step=three))


class MadeLate(nn.Module):
    """A head that is made for the first batch, or weights that every batch makes anew."""

    def __init__(self, anew):
        super().__init__()
        self.first, self.head, self.anew = nn.Linear(6, 4), None, anew

    def forward(self, x):
        if self.anew:
            self.first.weight = nn.Parameter(self.first.weight.detach().clone())
            return self.first(x)
        h = self.first(x)
        if self.head is None:
            self.head = nn.Linear(h.shape[1], 2)
        return self.head(h)


@pytest.mark.parametrize(("anew", "name"), [(False, "head.weight"), (True, "first.weight")])
def test_parameters_that_a_forward_makes_are_refused(anew, name):
    model = MadeLate(anew)
    was = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=f"parameter {name} of model MadeLate is made, or goes"):
        Server(model, [Client("a", (torch.randn(8, 6), torch.arange(8) % 2))])
    assert {k: id(p) for k, p in model.named_parameters()} == {k: id(p) for k, p in was.items()}
    if not anew:
        model(torch.randn(2, 6))  # as the sentence says
        Server(model, [Client("a", (torch.randn(8, 6), torch.arange(8) % 2))]).round()
