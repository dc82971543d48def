import pytest
import torch
from torch import nn

from conftest import make_clients
from fedtorch import ConfigError, Recipe, Server
from fedtorch.privacy import SampleLevel


def test_layers_that_draw_are_refused_for_what_they_do():
    class Noisy(nn.Linear):
        def forward(self, x):
            own = torch.Generator().manual_seed(torch.initial_seed())
            return super().forward(x + torch.randn(x.shape, generator=own))

    with pytest.raises(ConfigError, match="draws random numbers that no trial can hold still"):
        Server(Noisy(6, 4), make_clients([8]), Recipe(privacy=SampleLevel(rounds=1)))


def test_a_parameter_without_a_part_in_the_loss_is_named():
    class Spare(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.extra = nn.Linear(2, 2)

    model = Spare()
    with pytest.raises(ConfigError, match=r"extra\.weight has no part in the loss of any example"):
        Server(model, make_clients([8]), Recipe(privacy=SampleLevel(rounds=1)))


def test_a_model_may_write_on_its_batch_and_keep_statistics_still_by_itself():
    class Still(nn.Sequential):
        def train(self, mode: bool = True):
            super().train(mode)
            self[1].eval()
            return self

        def forward(self, x):
            return super().forward(x.mul_(2))

    model = Still(nn.Linear(6, 4), nn.BatchNorm1d(4))
    before = model[1].running_mean.clone()
    plan = SampleLevel(rounds=1, noise_multiplier=1.0)
    Server(model, make_clients([8]), Recipe(privacy=plan)).round()
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(ConfigError, match=r"BatchNorm1d.* mixes the examples"):
        Server(nn.Sequential(*model), make_clients([8]), Recipe(privacy=plan))


def test_narrow_numbers_are_named_and_not_taken_for_mixing():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.b(self.a(x).relu()).float()

    with pytest.raises(ConfigError, match=r"computes in bfloat16 .*: compute in float32"):
        Server(Half(), make_clients([8]), Recipe(privacy=SampleLevel(rounds=1)))


def test_weights_of_two_types_have_private_gradients_and_keep_their_types():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4).double()

        def forward(self, x):
            return self.b(self.a(x).relu().double())

    torch.manual_seed(0)
    model, (client,) = Two(), make_clients([8])
    wanted = {k: torch.zeros_like(p) for k, p in model.named_parameters()}
    for x, y in client.data:
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        grads = torch.autograd.grad(loss, [*model.parameters()])
        norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
        for (k, total), g in zip(wanted.items(), grads, strict=True):
            wanted[k] = total + min(1.0, 0.5 / norm) * g
    wanted = {k: p.detach() - 0.1 * wanted[k] / 8 for k, p in model.named_parameters()}
    options = {"noise_multiplier": 1e-9, "sample_rate": 1.0, "steps": 1, "batch_size": 8}
    plan = SampleLevel(clip=0.5, rounds=1, **options)
    Server(model, [client], Recipe(lr=0.1, privacy=plan)).round()
    for k, p in model.named_parameters():
        assert p.dtype == wanted[k].dtype and (p - wanted[k]).abs().max() <= 1e-6, k


def test_a_step_that_takes_gradients_of_a_batch_is_refused_for_mixing_it():
    def adapted(model, batch):
        x, y = batch
        params = dict(model.named_parameters())
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, [*params.values()], create_graph=True)
        params = {k: p - g for (k, p), g in zip(params.items(), grads, strict=True)}
        output = torch.func.functional_call(model, params, (x,))
        return nn.functional.cross_entropy(output, y, reduction="none")

    with pytest.raises(ConfigError, match="mixes the examples of a batch"):
        Server(
            nn.Linear(6, 4),
            make_clients([8]),
            Recipe(step=adapted, privacy=SampleLevel(rounds=1)),
        )
