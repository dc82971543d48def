"""What is tried before private training must not hang on a number in the data."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from conftest import mlp
from fedtorch import Client, Local, Recipe, Server
from fedtorch.checks import standins
from fedtorch.checks.standins import BOUND, limited, made, shown
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.training.batches import fetch, len_of
from fedtorch.training.module import snapshot
from fedtorch.types import ConfigError, Task

PLANS = [
    SampleLevel(rounds=3, noise_multiplier=1.0),
    SampleLevel(rounds=3, noise_multiplier=1.0, mode="hooks"),
    SampleLevel(rounds=3, noise_multiplier=1.0, mode="stacked"),
    SampleLevel(rounds=3, noise_multiplier=1.0, projected=True),
    ClientLevel(rounds=3, noise_multiplier=1.0),
    LocalDP(rounds=3, noise_multiplier=1.0),
]


class Pairs(Dataset):
    """Of tensors and arrays, words and plain numbers."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, k: int):
        image = {"x": self.x[k], "more": np.float32(self.x[k, 0]), "name": "somebody"}
        return image, int(k % 2)


def test_made_up_examples_have_the_shapes_and_types_of_the_data_and_nothing_else():
    x = torch.full((40, 3, 4), 7.0)
    table = made(TensorDataset(x, torch.full((40,), 9)))
    again = made(TensorDataset(x * math.nan, torch.zeros(40, dtype=torch.long)))
    (a, y), (b, _) = table.tensors, again.tensors
    assert torch.equal(a, b) and a.shape[1:] == (3, 4) and a.dtype == torch.float32
    assert a.min() > 0 and a.max() <= 1
    assert y.dtype == torch.long and sorted(set(y.tolist())) == [0, 1] and y[0] != y[1]
    turned = made(TensorDataset(x.transpose(1, 2), torch.zeros(40)))
    assert not turned.tensors[0].is_contiguous()
    # amounts as targets are yes and no, as probabilities are, never what is between
    several = made(TensorDataset(x, torch.full((40, 3), 0.5)))
    for target in (turned.tensors[1], several.tensors[1]):
        assert target.dtype == torch.float32 and set(target.flatten().tolist()) == {0.0, 1.0}

    (x, y), (again, _) = (
        fetch(made(Pairs(v)), torch.arange(5)) for v in (torch.ones(9, 2), torch.zeros(9, 2))
    )
    assert x["x"].shape == (5, 2) and x["more"].dtype == torch.float32
    assert x["name"] == ["somebody"] * 5 and y.tolist() == [0, 1, 0, 1, 0]
    assert torch.equal(x["x"], again["x"]) and torch.equal(x["more"], again["more"])


def test_what_takes_no_made_up_examples_is_shown_its_own_within_bounds():
    class Picky(nn.Linear):
        def forward(self, x):
            if float(x.detach().nan_to_num().abs().max()) < 2:
                raise ValueError("too small")
            return super().forward(x)

    x = torch.full((3, 2), 5.0)
    x[1], x[2] = torch.tensor([3e38, math.nan]), torch.tensor([-math.inf, math.inf])
    (one,) = shown(Picky(2, 3), [Client("c", (x, torch.arange(3)))], Recipe(privacy=PLANS[0]))
    assert one.data.tensors[0].tolist() == [[5.0, 5.0], [BOUND, 0.0], [-BOUND, BOUND]]
    assert len_of(limited(Pairs(x))) == 3 and len(one) == 3


def test_clients_of_one_kind_share_what_is_made_up_and_without_privacy_are_themselves():
    many = [Client(f"c{k}", (torch.rand(k + 1, 2), torch.zeros(k + 1).long())) for k in range(5)]
    made_up = shown(nn.Linear(2, 3), many, Recipe(privacy=PLANS[0]))
    assert len({id(c.data) for c in made_up}) == 1
    assert [len(c) for c in made_up] == [1, 2, 3, 4, 5]
    assert shown(nn.Linear(2, 3), many, Recipe()) is many


@pytest.mark.parametrize(
    "plan", PLANS, ids=lambda p: f"{type(p).__name__}-{getattr(p, 'mode', '')}"
)
@pytest.mark.parametrize("make", ["linear", "mlp", "conv"])
def test_one_row_changes_no_choice_and_leaves_nobody_out(make, plan):
    torch.manual_seed(0)
    net = {
        "linear": lambda: nn.Linear(6, 3),
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        "conv": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)
        ),
    }[make]()  # fmt: skip
    x, y = torch.rand(20, 6), torch.arange(20) % 3
    if make == "conv" and getattr(plan, "projected", False):
        with pytest.raises(ConfigError, match="projected noise needs a linear layer"):
            Local().open(net, [Client("c", (x, y))], Recipe(privacy=plan))
        return
    seen = set()
    for value in (0.5, 0.0, 3e38, -3e38, 1e-42, math.nan, math.inf):
        rows = x.clone()
        rows[0] = value  # the first is what trials looked at
        session = Local().open(copy.deepcopy(net), [Client("c", (rows, y))], Recipe(privacy=plan))
        task = Task(snapshot(net), {}, 0, 0, 0.1, {"clip": 1.0, "noise": 1.0})
        session.submit(["c"], task)
        (update,) = [*session.collect()]
        figures = sorted(update.metrics)
        mode = getattr(session.recipe.privacy, "mode", None)
        names = tuple(update.sent["delta"])
        seen.add((session.notes, mode, update.ids, names, *figures))
        assert all(bool(v.isfinite().all()) for v in update.metrics.values())
        assert float(update.metrics["train_loss"].abs().max()) <= 1e6
        assert all(bool(v.isfinite().all()) for v in update.sent["delta"].values())
    assert len(seen) == 1


def test_the_number_of_made_up_examples_is_known():
    assert len_of(made(TensorDataset(torch.rand(2, 3), torch.zeros(2)))) == standins.COUNT


class Unread(Dataset):
    def __len__(self) -> int:
        return 5


class Single(Unread):
    def __getitem__(self, k: int) -> int:
        return k


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (Unread(), "taking the first examples of its dataset failed"),
        (Single(), r"a dataset must give \(x, y\) pairs, unless a step .* Tensor"),
    ],
)
@pytest.mark.parametrize(
    "plan", [SampleLevel(rounds=1), ClientLevel(rounds=1)], ids=["sample", "client"]
)
def test_data_without_pairs_are_refused_by_the_clients_name(data, why, plan):
    with pytest.raises(ConfigError, match=f"client odd: {why}"):
        Server(mlp(), [Client("odd", data)], Recipe(privacy=plan))


def of_class_two_and_more(output, target):
    """Looks at neighbours, but only those of classes that two of a kind do not show."""
    each = nn.functional.cross_entropy(output, target, reduction="none")
    many = (target >= 2).float()
    return each + many * (many * each).sum()


@pytest.mark.parametrize("plan", [PLANS[0], *PLANS[4:]], ids=lambda p: type(p).__name__)
def test_a_loss_that_looks_at_neighbours_of_some_classes_is_noticed(plan):
    x, y = torch.randn(60, 5), torch.arange(60) % 7
    clients = [Client(str(n), TensorDataset(x[:n], y[:n])) for n in (60, 31, 11)]
    recipe = Recipe(loss=of_class_two_and_more, privacy=plan, batch_size=8)
    if isinstance(plan, SampleLevel):
        with pytest.raises(ConfigError, match="mixes the examples"):
            Server(nn.Linear(5, 7), clients, recipe)
        return
    server = Server(nn.Linear(5, 7), clients, recipe)
    assert "looks at the whole batch" in " ".join(server.notes)


def test_made_up_targets_are_of_as_many_classes_as_the_model_tells_apart():
    def least_of_seven(output, target):
        return nn.functional.cross_entropy(output, target, torch.ones(7), reduction="none")

    for y, outputs, loss, highest in (
        (torch.zeros(9, dtype=torch.long), 7, least_of_seven, 6),
        (torch.zeros(9, 4, dtype=torch.uint8), 300, lambda o, t: o.mean((1, 2)), 254),
        (torch.zeros(9), 7, lambda o, t: o.mean(1), 1),
    ):
        model = nn.Linear(5, outputs)
        if y.dim() == 2:
            model = nn.Sequential(nn.Linear(5, outputs * 4), nn.Unflatten(1, (outputs, 4)))
        recipe = Recipe(loss=loss, privacy=PLANS[4])
        (client,) = shown(model, [Client("a", TensorDataset(torch.ones(9, 5), y))], recipe)
        found = client.data.tensors[1]
        assert found.dtype == y.dtype and 1 <= int(found.max()) <= highest
        assert int(found.max()) > 1 or highest == 1
        assert y.dim() == 2 or int(found.min()) == 0


def test_labels_come_in_pairs_and_the_first_four_are_no_background():
    assert standins.labels(2) == [0, 1] * 8
    for classes in (3, 4, 8, 10, 50_000):
        found = standins.labels(classes)
        assert len(found) == standins.COUNT and set(found) <= set(range(classes))
        assert found[:4] == [1, classes - 1] * 2 and 0 in found
        assert len(set(found)) == min(classes, 8) and all(found.count(k) > 1 for k in found)


def test_made_up_classes_fit_outputs_whose_classes_lie_on_another_axis():
    """CTC of [B, time, classes]: torch reads past the memory of a class that there is not."""

    class Times(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 5)

        def forward(self, x):
            return self.inner(x[..., None])

    def ctc(output, target):
        assert int(target.max()) < 5
        long, labels = (torch.full((len(target),), n) for n in (6, 2))
        heard = output.log_softmax(2).transpose(0, 1)
        return nn.functional.ctc_loss(heard, target, long, labels, reduction="none")

    client = Client("a", (torch.randn(20, 6), torch.randint(1, 5, (20, 2))))
    Server(Times(), [client], Recipe(loss=ctc, privacy=PLANS[0])).round()
