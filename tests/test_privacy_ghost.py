"""Norms and clipped sums of layers whose examples' gradients are never written out."""

import math

import pytest
import torch
from torch import nn

from fedtorch.privacy import gradients
from fedtorch.privacy.ghost import Ghosts, Product, apart, pays
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream
from fedtorch.privacy.one_client import private_gradients
from fedtorch.training.losses import cross_entropy
from fedtorch.training.step import Supervised


class Words(nn.Module):
    """Looks rows up, one of them more than once, and one that is padding."""

    def __init__(self, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows, self.head = nn.Embedding(9, 5, **options), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.rows(x).sum(1)))


X, Y = torch.tensor([[1, 1, 2, 0], [0, 0, 0, 0], [8, 8, 8, 8], [3, 4, 5, 1]]), torch.arange(4)


def summed(net: nn.Module, x, y, mode: str, clip: float) -> torch.Tensor:
    steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "test")], mode)
    with private_gradients(net, Supervised(cross_entropy), steps) as found:
        found.backward((x, y))
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad]).double()


@pytest.mark.parametrize("frozen", ["", "rows.weight", "head.weight", "head.bias"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}])
@pytest.mark.parametrize("clip", [0.3, 1e6])
def test_the_sum_is_that_of_examples_alone(clip, options, frozen):
    net = Words(**options)
    for k, p in net.named_parameters():
        p.requires_grad_(k != frozen)
    want, got = (summed(net, X, Y, mode, clip) for mode in ("alone", "ghost"))
    torch.testing.assert_close(got, want, atol=1e-7, rtol=1e-6)


def test_a_layer_used_twice_is_refused_and_nothing_stays_on_the_model():
    net = nn.Sequential(nn.Linear(3, 3))
    ghosts = Ghosts(net)
    with pytest.raises(NotImplementedError, match="used twice"):
        net(net(torch.ones(2, 3)))
    ghosts.close()
    assert not net[0]._forward_hooks


def test_rows_of_sequences_are_refused():
    net = nn.Sequential(nn.Linear(3, 3))
    ghosts = Ghosts(net)
    with pytest.raises(NotImplementedError, match="several rows"):
        net(torch.ones(2, 4, 3)).sum().backward()
    ghosts.close()


def test_written_out_gradients_are_split_to_fit_into_memory(monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 4))
    x, y, seen = torch.randn(7, 6), torch.arange(7) % 4, []
    whole = summed(net, x, y, "ghost", 0.3)
    monkeypatch.setattr(gradients, "ROOM", 3 * 8)  # the convolution has eight numbers
    net.register_forward_hook(lambda m, inputs, out: seen.append(len(out)))
    assert (summed(net, x, y, "ghost", 0.3) - whole).abs().max() < 1e-6
    assert seen == [3, 3, 1]


def test_ghost_sums_stay_within_the_clip_where_gradients_cancel():
    # what comes back to the first layer is a sum that is zero but for rounding, and what went in is huge;
    # by a second pass over scaled losses it would round in another way, past the clip
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 7))
    with torch.no_grad():
        net[0].weight.mul_(1e-9)
        net[1].weight.copy_(torch.randn(3).expand(7, 3))
    x, y = 1e10 * torch.randn(64, 4), torch.arange(64) % 7
    worst = max(
        float(summed(net, x[k : k + 1], y[k : k + 1], "ghost", 0.3).norm()) for k in range(64)
    )
    assert worst <= 0.3 * (1 + 1e-5)
    assert math.isfinite(worst)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
@pytest.mark.parametrize("trained", ["weight bias", "weight", "bias"])
def test_a_norm_of_pairs_is_no_less_than_what_is_summed(trained, scale):
    g, n = torch.Generator().manual_seed(0), 8
    layer = nn.Linear(6, 5)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in trained.split())
    a, d = torch.randn(n, 4, 6, generator=g), torch.randn(n, 4, 5, generator=g)
    d[0] = 0
    for k, rest in enumerate([0.0, 1e-7, 1e-5, 1e-3, 1e-1], 2):  # rows cancel but for so much
        a[k, 2:], d[k, 2:] = a[k, :2] * (1 + rest), -d[k, :2]
    a, d = a / scale, d * scale
    d[1] *= 1e-3
    seen = Product(layer, a, d)
    found = seen.sq_norms()
    params = [p for p in layer.parameters() if p.requires_grad]
    for k in range(n):
        total = {p: torch.zeros_like(p) for p in params}
        seen.add(torch.eye(n)[k], total.get)
        summed = torch.cat([t.double().flatten() for t in total.values()]).square().sum()
        assert summed <= found[k] * (1 + 1e-6)
    parts = {"weight": d.double().mT @ a.double(), "bias": d.double().sum(1)}
    want = sum(parts[name].flatten(1).square().sum(1) for name in trained.split())
    torch.testing.assert_close(found[[1, 7]], want[[1, 7]], rtol=1e-4, atol=0)
    assert found[0] == 0


@pytest.mark.parametrize("large, small", [(1e18, 4.5e-23), (4.5e-23, 1e18)])
def test_norms_of_pairs_are_whole_where_products_of_one_side_lose_their_digits(large, small):
    a, d = torch.full((1, 4, 6), large), torch.full((1, 4, 5), small)
    found = Product(nn.Linear(6, 5, bias=False), a, d).sq_norms()
    assert float(found[0]) >= 16 * 6 * 5 * (1e18 * 4.5e-23) ** 2 * (1 - 1e-6)


def test_norms_of_pairs_are_whole_where_all_numbers_are_rounded_one_way():
    a, d = torch.full((1, 8, 4096), 1.9), torch.full((1, 8, 512), 0.7)
    found = Product(nn.Linear(4096, 512), a, d).sq_norms()
    one = 64 * 512 * float(d[0, 0, 0]) ** 2
    # how long a product rounds upwards hangs on the processor: 1e-5 of it on AMD's
    assert one * (4096 * float(a[0, 0, 0]) ** 2 + 1) <= found[0] <= 1.0003 * one * 4096 * 1.9**2


def test_pairs_of_rows_are_taken_where_they_are_less_work():
    assert pays(1, 8, 1)
    assert pays(32, 768, 3072)
    assert not pays(80, 128, 384)
    assert not pays(784, 9, 16)


def test_a_partly_frozen_layer_keeps_gradients_of_single_examples():
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert apart(layer)
    layer.weight.requires_grad_(False)
    assert not apart(layer)
    assert not apart(nn.Embedding(3, 2, scale_grad_by_freq=True))
