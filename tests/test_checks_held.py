"""Models that draw numbers: private where an example's result is its own given them, refused where not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtorch import Client, ConfigError, Recipe, Server
from fedtorch.checks.held import RowDraws
from fedtorch.privacy import SampleLevel

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))


RARELY = {
    "small": lambda: torch.rand(()) < 0.001,
    "normal": lambda: torch.randn(1) > 3,
    "one of eight": lambda: torch.randint(8, ()) == 5,
    "coin": lambda: torch.bernoulli(torch.zeros(()), 0.01) > 0,
    "two": lambda: torch.rand(()) < 0.05 and torch.rand(()) > 0.95,
}


class Autoencoder(nn.Module):
    """A variational autoencoder; ``company`` is how its code comes to depend on the batch."""

    def __init__(self, company: str = "") -> None:
        super().__init__()
        self.company = company
        self.encode, self.decode = nn.Linear(5, 4), nn.Linear(2, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log = self.encode(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log / 2).exp()
        if self.company == "mean":
            code = code + 0.1 * code.mean(0)
        if self.company == "gate" and torch.rand(()) < 0.5:
            code = code + code.mean(0)
        if self.company in RARELY and RARELY[self.company]():
            code = code + code.mean(0)
        if self.company == "rows":
            code = torch.where(torch.rand(len(x), 1) > 0.99, code.mean(0), code)
        if self.company == "product":
            code = code + 0.1 * torch.randn(len(x), len(x)) @ mean
        if self.company == "shuffle":
            code = code + 0.1 * code[torch.randperm(len(code))]
        if self.company == "numpy":
            code = code * float(np.random.rand())
        return self.decode(code), mean, log


def bound(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, _ = batch
    output, mean, log = model(x)
    return (output - x).square().sum(1) + 0.5 * (mean.square() + log.exp() - 1 - log).sum(1)


def serve(company: str = "", mode: str = "auto") -> Server:
    plan = SampleLevel(noise_multiplier=1.0, rounds=2, clip=1.0, mode=mode)
    clients = [Client(str(k), (X[k::2], X[k::2, 0])) for k in range(2)]
    return Server(Autoencoder(company), clients, Recipe(step=bound, privacy=plan, lr=0.1))


@pytest.mark.parametrize("mode", ["auto", "hooks", "ghost", "alone"])
def test_an_autoencoder_that_draws_trains_under_sample_level_privacy(mode: str) -> None:
    figures = serve(mode=mode).round()
    assert figures["clients"] == 2 and figures["privacy_epsilon"] > 0


@pytest.mark.parametrize("company", ["mean", "gate", "product", "rows", *RARELY])
def test_a_model_that_draws_and_mixes_examples_is_refused(company: str) -> None:
    with pytest.raises(ConfigError, match="mixes the examples of a batch"):
        serve(company)


@pytest.mark.parametrize("company", ["shuffle", "numpy"])
def test_draws_that_no_trial_can_hold_are_refused_with_the_fix(company: str) -> None:
    with pytest.raises(ConfigError, match=r"torch\.randn, rand, normal"):
        serve(company)


def test_one_after_another_is_the_way_of_models_that_draw() -> None:
    with pytest.raises(ConfigError, match="draws random numbers other than by dropout"):
        serve(mode="stacked")


CALLS = {
    "randn": lambda n: torch.randn(n, 3),
    "rand": lambda n: torch.rand(n, 3),
    "like": lambda n: torch.randn_like(torch.zeros(n, 3)),
    "normal": lambda n: torch.normal(torch.full((n, 3), 2.0), 3.0),
    "in place": lambda n: torch.empty(n, 3).normal_(2.0, std=3.0),
    "uniform": lambda n: torch.empty(n, 3).uniform_(-2, 5),
    "integers": lambda n: torch.randint(2, 9, (n, 3)),
    "up to": lambda n: torch.randint(9, (n, 3)),
    "coins": lambda n: torch.bernoulli(torch.full((n, 3), 0.3)),
    "tossed": lambda n: torch.empty(n, 3).bernoulli_(0.3),
    "chance": lambda n: torch.bernoulli(torch.zeros(n, 3), 0.3),
    "waits": lambda n: torch.empty(n, 3).exponential_(2.0),
    "gumbel": lambda n: F.gumbel_softmax(torch.ones(n, 3), tau=0.5),
    "chosen": lambda n: F.gumbel_softmax(torch.ones(n, 3), hard=True),
    "distribution": lambda n: torch.distributions.Normal(torch.full((n, 3), 2.0), 3.0).rsample(),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_example_draws_the_same_in_every_batch_and_as_it_is_asked(name: str) -> None:
    draw, held = CALLS[name], RowDraws(0, 2000)
    with held.of(torch.arange(2000)):
        whole = draw(2000)
    with held.of(torch.tensor([7, 3, 7])):
        some = draw(3)
    assert torch.equal(some, whole[[7, 3, 7]]) and whole.double().std(0).all()
    torch.manual_seed(0)
    asked = draw(2000)
    assert asked.dtype == whole.dtype
    for figure in (torch.mean, torch.std, torch.amin, torch.amax):
        if name in (
            "integers",
            "up to",
            "coins",
            "rand",
            "uniform",
            "tossed",
            "chance",
        ) or figure in (
            torch.mean,
            torch.std,
        ):
            assert float(figure(whole.double())) == pytest.approx(
                float(figure(asked.double())), abs=0.25
            )
