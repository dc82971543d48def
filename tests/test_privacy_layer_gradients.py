"""Clipped sums by formulas of layers, of all kinds and uses of them, against examples one at a time."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedtorch import Recipe, Server
from fedtorch.client import Client
from fedtorch.privacy import SampleLevel, ghost, layer_gradients
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream
from fedtorch.privacy.one_client import private_gradients
from fedtorch.training.losses import cross_entropy
from fedtorch.training.step import Supervised
from fedtorch.types import ConfigError


class Called(nn.Module):
    """A network by hand, so that what is called how often is as a test wants it."""

    def __init__(self, forward, **layers: nn.Module) -> None:
        super().__init__()
        self.by = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        return self.by(self, x)


class Tokens(nn.Module):
    """Parameters that belong to no layer: a token before the rows, positions, and a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = (
            nn.Parameter(torch.randn(1, 1, 5)),
            nn.Parameter(torch.randn(1, 4, 5)),
        )
        self.scale, self.unused = (
            nn.Parameter(torch.ones(1, 1, 5)),
            nn.Parameter(torch.ones(1, 1, 1)),
        )
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.place[:, : x.shape[1] + 1]
        return self.head(torch.tanh(x * self.scale).mean(1))


class Mixed(Tokens):
    """The token is used in another way."""

    def forward(self, x):
        return super().forward(x + self.token[0])


def images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


def twice() -> nn.Module:
    again = nn.Linear(6, 6)
    return nn.Sequential(again, nn.Tanh(), again, nn.ReLU(inplace=True), nn.Linear(6, 4))


def tied() -> nn.Module:
    net = Called(
        lambda m, x: m.head(m.table(x).tanh()).mean(1),
        table=nn.Embedding(9, 5),
        head=nn.Linear(5, 9),
    )
    net.head.weight = net.table.weight
    return net


def partly() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    net[0].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def adapters() -> nn.Module:
    net = Called(
        lambda m, x: m.out(m.norm(m.base(x) + m.up(m.down(x))).mean(1)),
        base=nn.Linear(5, 7), down=nn.Linear(5, 2, bias=False), up=nn.Linear(2, 7, bias=False),
        norm=nn.LayerNorm(7), out=nn.Linear(7, 4),
    )  # fmt: skip
    net.base.requires_grad_(False)
    return net


def placed(index) -> nn.Module:
    return Called(
        lambda m, x: m.out((m.words(x) + m.places(index(x))).tanh().mean(1)),
        words=nn.Embedding(9, 5, padding_idx=0), places=nn.Embedding(8, 5), out=nn.Linear(5, 4),
    )  # fmt: skip


def windows(m, x):
    parts = m.conv(x.unflatten(3, (2, 4)).permute(0, 3, 1, 2, 4).flatten(0, 1))
    return m.out(m.norm(parts).flatten(1)).unflatten(0, (-1, 2)).mean(1)


def recurrent(kind, pick=lambda out, last: out[:, -1], start=None, **options) -> nn.Module:
    """The layer between two others, or the first where ``start`` gives its first state."""
    options = {"batch_first": True} | options

    def forward(m, x):
        seen = x if start else m.first(x)
        seen = seen if options["batch_first"] else seen.transpose(0, 1)
        out, last = m.cell(seen, *([start(m, x)] if start else []))
        return m.head(pick(out if options["batch_first"] else out.transpose(0, 1), last))

    cell = kind(5, 6, **options)
    return Called(forward, first=nn.Linear(5, 5), cell=cell, head=nn.LazyLinear(4))


def no_first(net: nn.Module) -> nn.Module:
    """Whose first layer is not used."""
    net.first.requires_grad_(False)
    return net


def states(m, x):
    return torch.tanh(x[:, 0, :1]).expand(3, -1, 6).contiguous()


def both_states(m, x):
    return states(m, x), -states(m, x)


def frozen_states(net: nn.Module) -> nn.Module:
    net.cell.weight_hh_l0.requires_grad_(False)
    net.cell.bias_ih_l0.requires_grad_(False)
    return net


def attended(forward, **options) -> nn.Module:
    options = {"batch_first": True} | options
    return Called(forward, mha=nn.MultiheadAttention(6, 2, **options), head=nn.Linear(6, 4),
                  first=nn.Linear(5, 6), other=nn.Linear(5, options.get("kdim") or 6))  # fmt: skip


def itself(m, x):
    h = m.first(x) + m.other(x)
    causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
    return m.head(m.mha(h, h, h, attn_mask=causal, need_weights=False, is_causal=True)[0].mean(1))


def across(m, x):
    h, o = m.first(x), m.other(x).transpose(0, 1)
    out, weights = m.mha(h.transpose(0, 1), o, o, key_padding_mask=x[..., 0] > 1)
    return m.head(out.mean(0)) + weights.square().sum((1, 2))[:, None]


def masked(m, x):
    mask = torch.eye(x.shape[1], dtype=torch.bool).repeat(2 * len(x), 1, 1)
    kept = torch.where(x[..., 1] > 1, -2.0, 0.0).to(x)
    h = m.first(x)
    seen = m.mha(
        h, m.other(x), h, attn_mask=mask.to(x) * -3, key_padding_mask=kept, need_weights=False
    )
    return m.head(seen[0].mean(1))


def encoder() -> nn.Module:
    deep = nn.TransformerEncoderLayer(6, 2, 7, 0.0, batch_first=True)
    return Called(
        lambda m, x: m.head(m.deep(m.first(x)).mean(1)),
        first=nn.Linear(5, 6), head=nn.Linear(6, 4), deep=deep,
    )  # fmt: skip


class Scale(nn.Module):
    """A norm of a user's own, as language models have it, with one number that is not trained."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(0.5, 1.5, channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x):
        x = x / x.square().mean(-1, keepdim=True).add(0.1).sqrt() * self.fixed
        return x * self.factor + torch.tanh(x + self.shift)


class Turned(nn.Module):
    """A linear layer as GPT-2 has it, [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        flat = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return flat.view(*x.shape[:-1], -1)


class Doubled(nn.Linear):
    """Not what its parent is."""

    def forward(self, x):
        return 2 * super().forward(x)


class Louder(nn.Embedding):
    """As encoders of language models have it."""

    def forward(self, x):
        return super().forward(x) * 3.0


class Scaled(Turned):
    """Also by numbers [1, ...], as positions are."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, inputs).view(1, 1, -1))

    def forward(self, x):
        return super().forward(x * self.scale)


class Block(nn.Module):
    """As ConvNeXt's: a scale of channels beside layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale, self.gamma = (nn.Parameter(torch.rand(channels, *n)) for n in ((1, 1), ()))
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.inner = nn.Linear(channels, channels)

    def forward(self, x):
        x = x + self.scale * self.conv(x)
        y = self.gamma * self.inner(x.permute(0, 2, 3, 1)).tanh()
        return x + y.permute(0, 3, 1, 2) / F.softplus(self.scale)


class LowRank(nn.Module):
    """An adapter about a layer that is frozen."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = (
            nn.Parameter(torch.randn(inputs, 2)),
            nn.Parameter(torch.randn(outputs, 2)),
        )

    def forward(self, x):
        return self.base(x) + F.linear(x @ self.down, self.up)


class Biased(nn.Module):
    """Rows of each example meet a table by places, as windows do in Swin; its masks are trained too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mask = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(2, 2))
        self.register_buffer("places", torch.tensor([[1, 4], [4, 0]]))
        self.register_buffer("shares", torch.tensor([0.5, 1.0, 2.0, 1.0, 0.0]))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        parts = x[:, [0, 1, 1, 2]].reshape(-1, 2, 5)  # two rows of each example
        bias = (self.table * self.shares)[self.places.view(-1)].view(2, 2, 5).sum(1)
        seen = F.scaled_dot_product_attention(parts, parts + bias, parts, attn_mask=self.mask[None])
        return self.head(seen).unflatten(0, (-1, 2)).sum((1, 2))


class InPlace(nn.Module):
    """What meets parameters is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 4)
        self.scale, self.shift = nn.Parameter(torch.rand(5)), nn.Parameter(torch.rand(3, 1))

    def forward(self, x):
        x = self.first(x)
        x *= self.scale
        x[:, 1:] += self.shift[1:]
        x.add_(self.shift)
        return self.head(x.tanh().mean(1))


class Gated(nn.Linear):
    """Takes and gives two things."""

    def forward(self, x, gate):
        return super().forward(x) * gate, gate + x[:, :1]


class Noisy(nn.Linear):
    """One that draws, the same for each of a batch."""

    def forward(self, x):
        return super().forward(x * torch.rand(6, generator=torch.Generator().manual_seed(1)).to(x))


class Listed(nn.Module):
    """Numbers in torch's list of parameters, of a sum with a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.shares = nn.ParameterList([torch.ones(()), torch.rand(5)])
        self.one, self.head = nn.Parameter(torch.rand(1)), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(sum(share * x for share in self.shares).mean(1) + self.one) * self.one


def squared(m, x):
    return m.a(x) * (1 + m.a.weight.square().mean())


def own_tied() -> nn.Module:
    def forward(m, x):
        return m.turned(m.table(x).mean(1)[:, :1] * F.one_hot(x, 9).sum(1)) + m.table(x).sum(1)

    net = Called(forward, table=nn.Embedding(9, 5), turned=Turned(9, 5))
    net.turned.weight = net.table.weight
    return net


ROWS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
PARTS = torch.randn(5, 3, 5, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(5, 2, 6, 8, generator=torch.Generator().manual_seed(2))
WORDS = torch.randint(0, 9, (5, 5), generator=torch.Generator().manual_seed(3))
INSTANCE, LINES = (partial(n, affine=True) for n in (nn.InstanceNorm2d, nn.InstanceNorm1d))
NETS = {
    "twice": (twice, ROWS),
    "never": (lambda: Called(lambda m, x: m.a(x), a=nn.Linear(6, 4), b=nn.Linear(3, 2)), ROWS),
    "tied": (tied, WORDS),
    "partly": (partly, ROWS),
    "adapters": (adapters, PARTS),
    "by name": (lambda: Called(lambda m, x: m.a(input=x), a=nn.Linear(6, 4)), ROWS),
    "places": (lambda: placed(lambda x: torch.arange(x.shape[1])), WORDS),
    "place": (lambda: placed(lambda x: torch.arange(x.shape[1])[None]), WORDS),
    "own places": (lambda: placed(lambda x: (x > 3).long().cumsum(1)), WORDS),
    "one word": (lambda: Called(lambda m, x: m.a(x[:, 0]), a=nn.Embedding(9, 4)), WORDS),
    "all words": (
        lambda: Called(
            lambda m, x: m.b(m.a(x.flatten()).view(*x.shape, 3)).sum(1),
            a=nn.Embedding(9, 3), b=nn.Linear(3, 4),
        ),
        WORDS,
    ),
    "in place": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 2), nn.ELU(inplace=True),
                              nn.Flatten(), nn.Linear(6, 4)),
        PARTS,
    ),
    "windows": (
        lambda: Called(windows, conv=nn.Conv2d(2, 4, 3), norm=INSTANCE(4), out=nn.Linear(32, 4)),
        IMAGES,
    ),
    "strided": (
        lambda: images(nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), bias=False), nn.GroupNorm(2, 4)),
        IMAGES,
    ),
    "dilated": (lambda: images(nn.Conv2d(2, 4, 2, padding="same", dilation=2, groups=2)), IMAGES),
    "channels": (
        lambda: images(
            nn.Conv2d(2, 16, 1), nn.Conv2d(16, 3, 3, (2, 1), (1, 2), dilation=(1, 2)), nn.Tanh()
        ),
        IMAGES,
    ),
    "circular": (lambda: images(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.Tanh()), IMAGES),
    "lines": (lambda: images(nn.Flatten(2), nn.Conv1d(2, 4, 5, 3), LINES(4)), IMAGES),
    "lstm": (lambda: recurrent(nn.LSTM), PARTS),
    "lstm deep": (lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True, batch_first=False), PARTS),
    "lstm cell": (lambda: recurrent(nn.LSTM, lambda out, last: last[1][-1], bias=False), PARTS),
    "lstm partly": (lambda: frozen_states(recurrent(nn.LSTM)), PARTS),
    "gru": (lambda: recurrent(nn.GRU, num_layers=2, bidirectional=True), PARTS),
    "gru end": (lambda: recurrent(nn.GRU, lambda out, last: last[0], bias=False), PARTS),
    "gru begun": (lambda: no_first(recurrent(nn.GRU, num_layers=3, start=states)), PARTS),
    "lstm begun": (
        lambda: no_first(recurrent(nn.LSTM, num_layers=3, start=both_states)),
        PARTS,
    ),
    "rnn": (lambda: recurrent(nn.RNN, num_layers=2), PARTS),
    "rnn relu": (lambda: recurrent(nn.RNN, nonlinearity="relu", bidirectional=True), PARTS),
    "attention": (lambda: attended(itself), PARTS),
    "attention across": (lambda: attended(across, batch_first=False, kdim=3, vdim=3), PARTS),
    "attention masked": (lambda: attended(masked, bias=False), PARTS),
    "encoder": (encoder, PARTS),
    "slopes": (
        lambda: images(nn.Conv2d(2, 3, 3), nn.PReLU(3), nn.Flatten(2), nn.PReLU()),
        IMAGES,
    ),
    "transposed": (
        lambda: images(
            nn.ConvTranspose2d(2, 4, (3, 2), (2, 1), (1, 0), (1, 0), groups=2), nn.Tanh(),
            nn.ConvTranspose2d(4, 1, 2, dilation=2, bias=False), nn.Flatten(2),
            nn.ConvTranspose1d(1, 2, 3, 2),
        ),
        IMAGES,
    ),
    "roots": (
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.RMSNorm((3, 4), 1e-3), nn.Flatten(), nn.Linear(12, 4)
        ),
        PARTS,
    ),
    "tokens": (Tokens, PARTS),
    "tokens in two ways": (Mixed, PARTS),
    "own scale": (
        lambda: nn.Sequential(
            nn.Linear(5, 6), Scale(6), nn.Flatten(0, 1), Scale(6), Doubled(6, 4), nn.Unflatten(0, (-1, 3)),
            nn.Flatten(), nn.Linear(12, 4),
        ),
        PARTS,
    ),
    "own first": (
        lambda: nn.Sequential(
            Turned(5, 6), nn.Tanh(), Turned(6, 4), nn.Flatten(), Doubled(12, 4)
        ),
        PARTS,
    ),
    "own words": (lambda: Called(lambda m, x: m.a(x).sum(1), a=Louder(9, 4)), WORDS),
    "own twice": (lambda: Called(lambda m, x: m.b(m.a(m.a(x))), a=Doubled(6, 6), b=nn.Linear(6, 4)), ROWS),
    "padded words": (lambda: Called(lambda m, x: m.a(x).sum(1), a=Louder(9, 4, padding_idx=3)), WORDS),
    "own and other": (lambda: nn.Sequential(Scaled(5, 4), nn.Flatten(), nn.Linear(12, 4)), PARTS),
    "layer scale": (lambda: images(Block(2), Block(2)), IMAGES),
    "low rank": (lambda: nn.Sequential(LowRank(5, 4), nn.Tanh(), nn.Flatten(), LowRank(12, 4)), PARTS),
    "own bias": (Biased, PARTS),
    "own in place": (InPlace, PARTS),
    "own square": (lambda: Called(squared, a=Turned(6, 4)), ROWS),
    "own pair": (lambda: Called(lambda m, x: m.a(*m.a(x, x[:, :1]))[0], a=Gated(6, 6)), ROWS),
    "own noise": (lambda: nn.Sequential(Noisy(6, 4)), ROWS),
    "own and tied": (own_tied, WORDS),
    "own list": (Listed, PARTS),
    "blocks": (lambda: images(nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, 2), nn.Tanh()), IMAGES),
}  # fmt: skip
Y = torch.arange(5) % 4


def built(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(7)
    make, x = NETS[name]
    net = make()
    net(x)  # lazy layers
    return net.to(dtype), x.to(dtype) if x.is_floating_point() else x


def summed(net: nn.Module, x, y, mode: str, clip: float, most: int = 512) -> torch.Tensor:
    steps = PrivateSteps(clip, 0.0, 1.0, [stream("aes", 0, "test")], mode, most)
    with private_gradients(net, Supervised(cross_entropy), steps) as found:
        found.backward((x[:2], y[:2]))  # what is known of one batch must fit the next
        found.backward((x, y))
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.requires_grad])


@pytest.mark.parametrize("clip", [0.1, 1e6])
@pytest.mark.parametrize("pairs", [0, math.inf], ids=["written", "pairs"])
@pytest.mark.parametrize("name", NETS)
def test_the_sum_is_that_of_examples_alone(name, pairs, clip, monkeypatch):
    monkeypatch.setattr(ghost, "PAIRS", pairs)
    net, x = built(name, torch.float64)
    asked = [p.requires_grad for p in net.parameters()]
    want = summed(net, x, Y, "alone", clip)
    assert want.abs().max() > 1e-4
    for many, most in ((5, 512), (5, 3), (1, 512), (0, 512)):
        got, alone = (summed(net, x[:many], Y[:many], m, clip, most) for m in ("layers", "alone"))
        torch.testing.assert_close(got, alone, atol=1e-12, rtol=1e-9)
    single, x = built(name)
    torch.testing.assert_close(
        summed(single, x, Y, "layers", clip), want.float(), atol=1e-6, rtol=1e-4
    )
    assert [p.requires_grad for p in net.parameters()] == asked
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize("name", ["adapters", "dilated", "places", "tied"])
def test_an_example_that_is_not_finite_counts_as_nothing(name):
    net, x = built(name)
    table = next((m for m in net.modules() if isinstance(m, nn.Embedding)), None)
    bad = x.clone()
    if table is None:
        bad[2] = math.nan
    else:
        with torch.no_grad():
            table.weight[8] = math.nan
        bad, x = (torch.where(v == 8, 7, v) for v in (bad, x))
        bad[2, 0] = 8
    kept = torch.tensor([0, 1, 3, 4])
    clean, dirty = (summed(net, v, y, "layers", 0.1) for v, y in ((x[kept], Y[kept]), (bad, Y)))
    assert dirty.isfinite().all()
    torch.testing.assert_close(dirty, clean, atol=1e-6, rtol=1e-5)


def test_the_same_masks_drop_as_in_the_model_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 30), nn.Dropout(0.5), nn.Linear(30, 4))
    got = []
    for mode in ("layers", "alone"):
        torch.manual_seed(3)
        got.append(summed(net, ROWS, Y, mode, 0.1))
    torch.testing.assert_close(*got, atol=1e-6, rtol=1e-5)


def changed(m, x):
    h = torch.tanh(m.first(x))
    y = m.a(h)
    h += 1
    return y


def some(m, x):
    return F.pad(m.a(x[1:]), (0, 0, 1, 0))


def turned(m, x):
    return m.cell(x[..., None])[0].flatten(1)


def packed(m, x):
    seq = nn.utils.rnn.pack_padded_sequence(x[..., None], [6] * len(x), batch_first=True)
    return m.cell(seq)[1][0][0]


class Owner(Called):
    """A parameter beside a layer."""

    def __init__(self, forward) -> None:
        super().__init__(forward, a=nn.Linear(6, 4))
        self.own = nn.Parameter(torch.rand(6))


class Doubling(torch.autograd.Function):
    """Of torch's calls none is told of it."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x[:4]

    @staticmethod
    def backward(ctx, d):
        return 2 * F.pad(d, (0, 2))


def patched():
    """An LSTM whose forward was exchanged, as wrappers of models do."""
    net = recurrent(nn.LSTM)
    net.cell.forward = partial(doubled, net.cell)
    return net


def doubled(cell, x):
    out, last = nn.LSTM.forward(cell, x)
    return 2 * out, last


def test_a_forward_that_was_put_in_a_layers_place_stays_there():
    net, rows = patched(), torch.randn(5, 3, 5)
    before = net(rows)
    with pytest.raises(NotImplementedError, match=r"layer cell .LSTM. has a forward"):
        summed(net, rows, Y, "layers", 1.0)
    assert torch.equal(before, net(rows))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: nn.Sequential(nn.Bilinear(6, 6, 4)), "parameter 0.weight: Bilinear has no formula"),
        (lambda: nn.Sequential(nn.BatchNorm1d(6)), "parameter 0.weight: BatchNorm1d has no formula"),
        (lambda: Called(packed, cell=nn.LSTM(1, 4)), "LSTM takes packed sequences"),
        (lambda: Called(turned, cell=nn.GRU(1, 4)), r"layer cell sees \[6\] of 5 examples"),
        (lambda: nn.Sequential(nn.LSTM(6, 4, proj_size=2)), "parameter 0.weight_ih_l0: LSTM with"),
        (lambda: nn.Sequential(nn.MultiheadAttention(4, 2, add_bias_kv=True)), "add_bias_kv"),
        (lambda: Called(some, a=nn.Linear(6, 4)), r"layer a sees \[1, 6\] of 2 examples"),
        (lambda: Called(changed, first=nn.Linear(6, 6), a=nn.Linear(6, 4)), "what layer a took is changed"),
        (lambda: Owner(lambda m, x: m.a(m.own)[0] + x[:, :4]), "own is .* of another"),
        (lambda: Owner(lambda m, x: x[:, :4] + Doubling.apply(m.own)), "own is .* tells nobody"),
        (lambda: Owner(lambda m, x: x[:, :4] + m.own[torch.arange(3)].sum()), r"getitem.* \[3\] of 2"),
        (lambda: Owner(lambda m, x: x[:, :4] + m.own.expand(3, 6)[:1, :4]), r"expand.* \[3, 6\] of 2"),
        (lambda: Owner(lambda m, x: x[:, :4] + torch.dist(x, m.own)), "used in dist.*: Dimension"),
    ],
    ids=["kind", "mixes", "packed", "turned", "proj", "kv", "axes", "changed", "alone", "function",
         "places", "rows", "one"],
)  # fmt: skip
def test_what_it_cannot_see_is_named(make, why):
    net = make()
    with pytest.raises(NotImplementedError, match=why):
        summed(net, ROWS, Y, "layers", 1.0)
    assert all(p.requires_grad for p in net.parameters())


def outside(m, x):
    return m.a(x) + F.linear(x, m.a.weight)


def test_a_weight_used_outside_its_layer_is_found_before_training():
    who = [Client("c", (ROWS, Y))]

    net = Called(outside, a=nn.Linear(6, 4))
    recipe = Recipe(privacy=SampleLevel(rounds=1, batch_size=2, mode="layers"))
    with pytest.raises(
        ConfigError, match=r"layers cannot train .* a.weight is used outside its layer"
    ):
        Server(net, who, recipe)


def test_the_way_that_is_taken_is_said():
    who = [Client("c", (WORDS, Y))]
    server = Server(built("places")[0], who, Recipe(privacy=SampleLevel(rounds=1, batch_size=2)))
    assert "private gradients are taken by formulas of the model's layers" in map(str, server.notes)


def test_a_short_form_of_a_linear_layer_writes_nothing_out():
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    calls = [
        layer_gradients.Call(m, torch.randn(3, m.in_features), torch.randn(3, m.out_features), 3,
                             dict(m.named_parameters()))
        for m in (net[0], net[2])
    ]  # fmt: skip
    assert not any(isinstance(s, layer_gradients.Written) for s in layer_gradients.apart(calls))
    again = layer_gradients.apart([*calls, calls[0]])
    assert isinstance(again[-1], layer_gradients.Written)
    assert again[-1].numbers == sum(p.numel() for p in net[0].parameters())
    torch.testing.assert_close(again[-1].sq_norms(), 4 * calls[0].seen().sq_norms())
