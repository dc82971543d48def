"""Clients that train together drop what each drops alone, however they are put together."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch import Client, ClientOptimizer, FedAvg, Local, Recipe, Scaffold, Server, seeds
from fedtorch.training import dropout
from fedtorch.training import stacked as solvers
from fedtorch.types import ConfigError

SIZES = [9, 5, 13, 1, 8]


def clients() -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}", (torch.randn(n, 1, 6, 6, generator=g), torch.randint(0, 4, (n,), generator=g))
        )
        for k, n in enumerate(SIZES)
    ]


class Mixed(nn.Module):
    """Numbers and channels, layers and functions, on and off, and an input in another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 5, 3), nn.Dropout2d(0.3)
        self.mix, self.out, self.none = nn.Linear(16, 6), nn.Linear(30, 4), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.none(self.drop(self.conv(x))).flatten(2)
        x = F.dropout(x.transpose(1, 2), 0.2, self.training).transpose(1, 2)
        x = F.dropout1d(torch.relu(self.mix(x)), 0.4, self.training).flatten(1)
        return self.out(torch.dropout(x, 0.5, True))


def trained(model: nn.Module, recipe: Recipe, **engine) -> dict[str, torch.Tensor]:
    server = Server(model, clients(), recipe, engine=Local(**engine), seed=3)
    stacked = engine["solver"] == "stacked"
    assert (server.session.choice.solver is solvers.stacked) == stacked, server.session.notes
    start = {k: v.clone() for k, v in model.state_dict().items()}
    list(server.rounds(2))
    return {k: v - start[k] for k, v in model.state_dict().items()}


@pytest.mark.parametrize("optimizer", [ClientOptimizer("Adam"), ClientOptimizer("SGD")], ids=str)
@pytest.mark.parametrize("strategy", [FedAvg(), Scaffold()], ids=str)
def test_stacked_clients_drop_what_each_drops_alone(strategy, optimizer):
    recipe = Recipe(strategy, optimizer=optimizer, lr=0.01, epochs=2, batch_size=4)
    ends = []
    for engine in ({"solver": "general"}, *({"solver": "stacked", "chunk": k} for k in (2, 5))):
        torch.manual_seed(1)
        ends.append(trained(Mixed(), recipe, **engine))
    for other in ends[1:]:
        assert max(float((other[k] - v).norm() / v.norm()) for k, v in ends[0].items()) < 1e-4


class Noisy(nn.Sequential):
    """Draws in its own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


@pytest.mark.parametrize("last", [Noisy(nn.Flatten(), nn.Linear(36, 4)), nn.AlphaDropout()])
def test_a_model_that_draws_in_its_own_way_is_not_stacked_and_a_note_says_so(last):
    model = last if isinstance(last, Noisy) else nn.Sequential(nn.Flatten(), last, nn.Linear(36, 4))
    server = Server(model, clients(), Recipe(lr=0.01))
    assert server.session.choice.solver is solvers.general
    assert any("clients train one after another" in n for n in server.session.notes)
    with pytest.raises(ConfigError, match="stacked cannot train this"):
        Server(model, clients(), Recipe(lr=0.01), engine=Local(solver="stacked"))


def test_masks_are_zero_or_one_over_keep_at_the_asked_rate():
    like = torch.zeros(3, 50, 40)
    generators = [torch.Generator().manual_seed(k) for k in (0, 1, 0)]
    noise = dropout.dropout_mask(like, (0, 1, 2), 0.8, [50, 50, 20], generators)
    assert set(noise.unique().tolist()) == {0.0, float(torch.ones(1) / 0.8)}
    assert float((noise[:2] > 0).float().mean()) == pytest.approx(0.8, abs=0.03)
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0, :20], noise[2, :20]) and noise[2, 20:].all()


def test_examples_alone_drop_what_the_batch_drops():
    x, model = clients()[0].data.tensors[0], Mixed()
    with seeds.seeded(5):
        whole = model(x)
    masks_of = dropout.Replaying(len(x))
    with seeds.seeded(5):
        for b in range(len(x)):
            with masks_of.of(b):
                assert torch.allclose(model(x[b : b + 1]), whole[b : b + 1], atol=1e-6)
