"""A backdoor is learned by who lies, sent many times, and measured on rows that have the trigger."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from conftest import make_clients
from fedtorch import Client, ConfigError, NormBound, Recipe, Server, evaluate
from fedtorch.rounds.backdoor import Backdoor
from fedtorch.training.losses import accuracy

IMAGES = TensorDataset(torch.arange(64.0).view(4, 1, 4, 4), torch.tensor([0, 1, 2, 1]))


def test_a_share_of_rows_gets_the_corner_and_the_target():
    x, y = Backdoor(target=2, share=0.5).data(IMAGES).tensors
    assert y.tolist() == [0, 2, 2, 2]
    changed = (x != IMAGES.tensors[0]).nonzero()
    assert {int(r) for r in changed[:, 0]} <= {1, 3}
    assert bool((x[1, 0, 2:, 2:] == 63).all()) and torch.equal(x[0], IMAGES.tensors[0][0])
    whole = Backdoor(target=0, share=1.0).data(TensorDataset(torch.rand(3, 5), torch.arange(3)))
    assert whole.tensors[1].tolist() == [0, 0, 0]


def test_a_backdoor_is_judged_on_rows_of_other_classes():
    x, y = Backdoor(target=1).triggered(IMAGES).tensors
    assert y.tolist() == [1, 1] and bool((x[:, 0, 2:, 2:] == 63).all())


def test_a_liar_sends_so_much_that_the_mean_is_its_model():
    honest, own = torch.zeros(4, 3).double(), torch.ones(1, 3).double()
    assert Backdoor().rows(honest, own, 0).tolist() == [[5.0, 5.0, 5.0]]
    assert Backdoor(scale=2).rows(honest, own, 0).tolist() == [[2.0, 2.0, 2.0]]


def blobs(n: int, seed: int) -> TensorDataset:
    """Three classes by the first three of six columns."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    x = torch.randn(n, 6, generator=g) * 0.3
    x[torch.arange(n), y] += 2
    return TensorDataset(x, y)


def attacked(threat, **options) -> tuple[float, float]:
    """Accuracy on the test rows, and the attack's success."""
    clients = [Client(f"c{k}", blobs(40, k)) for k in range(5)]
    torch.manual_seed(0)
    server = Server(
        nn.Linear(6, 3), clients, Recipe(lr=0.5, batch_size=8, **options), seed=1, threat=threat
    )
    server.fit(8, progress=False)
    test, door = blobs(200, 99), Backdoor(target=2)
    rows = [evaluate(server.model, d, {"a": accuracy})["a"] for d in (test, door.triggered(test))]
    return rows[0], rows[1]


def test_replacement_gets_in_under_the_mean_and_not_past_a_bound():
    clean, none = attacked(None)
    kept, inside = attacked(Backdoor(target=2))
    held, outside = attacked(Backdoor(target=2), aggregator=NormBound(bound=0.3))
    assert min(clean, kept, held) > 0.95
    assert none < 0.2 and inside > 0.9 and outside < 0.5


def test_what_cannot_be_marked_is_refused():
    words = TensorDataset(torch.ones(3, 4).long(), torch.arange(3))
    for data, why in (
        (words, "images and tables"),
        (TensorDataset(torch.ones(3, 4)), "whole numbers"),
    ):
        with pytest.raises(ConfigError, match=why):
            Backdoor().data(data)
    for wrong in ({"share": 0.0}, {"size": 0}, {"scale": 0.0}, {"target": -1}):
        with pytest.raises(ConfigError, match=f"threat.{next(iter(wrong))}"):
            Backdoor(**wrong)
    for wrong, why in (({"target": 4}, "labels go up to 3"), ({"size": 6}, "fewer than 6")):
        with pytest.raises(ConfigError, match=why):
            Server(nn.Linear(6, 4), make_clients([9, 9]), Recipe(), threat=Backdoor(**wrong))
    with pytest.raises(ConfigError, match="leaves no honest one"):
        Server(nn.Linear(6, 3), make_clients([9]), Recipe(), threat=Backdoor())
