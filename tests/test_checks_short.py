import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from conftest import make_clients, mlp
from fedtorch import Client, ConfigError, Local, Recipe, Server
from fedtorch.privacy import ClientLevel, SampleLevel


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


@pytest.mark.parametrize("plan", [None, SampleLevel(rounds=1)], ids=["plain", "private"])
def test_a_loss_that_drops_the_axis_of_a_batch_of_one_is_told_how_not_to(plan):
    def careless(z, y):
        return F.binary_cross_entropy_with_logits(z.squeeze(), y.float(), reduction="none")

    clients = make_clients([9, 9], classes=2)
    with pytest.raises(ConfigError, match=r"one.* squeeze\(-1\)"):
        Server(mlp(classes=1), clients, Recipe(loss=careless, privacy=plan, batch_size=8))


def test_every_size_of_batch_that_comes_is_tried():
    class Odd(nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(2, -1, 6).flatten(0, 1) if len(x) == 5 else x)

    Server(Odd(*mlp()), make_clients([8, 10, 11]), Recipe(batch_size=8))
    with pytest.raises(ConfigError, match=r"client c2 has a batch of 5 examples \(13 .*so few"):
        Server(Odd(*mlp()), make_clients([8, 10, 13]), Recipe(batch_size=8))


class Broken(Dataset):
    """One of its examples cannot be taken, and its labels are text."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __len__(self) -> int:
        return 20

    def __getitem__(self, k: int):
        return torch.ones(4) / (k != self.at or 1 // 0), "yes" if self.at < 0 else 1


def test_an_example_that_cannot_be_taken_is_told_with_its_client():
    for at in (13, 0):
        with pytest.raises(ConfigError, match=r"client a: taking a batch of .* ZeroDivisionError"):
            Server(nn.Linear(4, 2), [Client("a", Broken(at))], Recipe(batch_size=8))
    with pytest.raises(ConfigError, match="the labels are text: number the classes"):
        Server(nn.Linear(4, 2), [Client("a", Broken(-1))], Recipe(batch_size=8))
    with pytest.raises(ConfigError, match=r"client 'a': 'x\.csv' names data and is none"):
        Client("a", "x.csv")
