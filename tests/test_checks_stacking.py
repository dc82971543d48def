import copy
import json
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import make_clients, mlp
from fedtorch import Client, ClientOptimizer, Local, Recipe, Server
from fedtorch.checks.stacking import mixes_examples, no_stacking
from fedtorch.privacy import SampleLevel
from fedtorch.training.losses import cross_entropy


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # control flow on data: torch.func cannot follow it
            return self.inner(x)
        return -self.inner(x)


def stacks(model: nn.Module, recipe: Recipe | None = None) -> str | None:
    return no_stacking(model, make_clients([5, 6]), recipe or Recipe())


def test_modules_that_vmap_can_follow_stack():
    assert stacks(mlp()) is None
    assert stacks(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))) is None


def test_what_cannot_stack_is_named_by_layer_and_falls_back():
    why = stacks(nn.Sequential(nn.Linear(6, 6), Raises()))
    assert why is not None
    assert why.startswith("layer 1 (Raises) cannot be vectorised")

    class After(nn.Linear):  # what fails stands behind a layer that is over
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.sum() > 0 else -x

    assert (stacks(nn.Sequential(nn.Identity(), After(6, 4))) or "").startswith("layer 1 (After)")
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


def test_an_optimizer_that_steps_on_rounding_is_named_as_the_reason():
    layers = [nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)]
    recipe = Recipe(optimizer=ClientOptimizer("Adam"), lr=0.01, batch_size=6)
    server = Server(nn.Sequential(*layers), make_clients([12, 12]), recipe)
    assert any("optimizer Adam makes steps of what is only rounding" in n for n in server.notes)


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
