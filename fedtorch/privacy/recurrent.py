"""LSTM, GRU and RNN by hand: the gates of every step are kept, and the way back through time is our own.

PyTorch's are one call, whose inside no hook sees. What comes back to the gates gives an example's gradients
as those of two linear layers that saw a row at every step (backpropagation through time, Werbos 1990).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fedtorch.privacy.formulas import Heard


@dataclass
class Pass:
    """One way through time: states [T + 1, n, H] with the first, gates, and what the way back needs."""

    h: Tensor
    gates: Tensor
    """[T, n, gates x H], each after its activation."""
    kept: Tensor
    """LSTM: cells [T + 1, n, H]. GRU: what a state gave to the new one, [T, n, H]. RNN: nothing."""


def lstm(z: Tensor, w: Tensor, b: Tensor | None, h0: Tensor, c0: Tensor) -> Pass:
    """Gates in, forget, new and out; ``z`` [T, n, 4H] is the inputs' part, and becomes the gates."""
    h, c = (torch.cat([s[None], s.new_empty(len(z), *s.shape)]) for s in (h0, c0))
    H, wt = h0.shape[1], w.T.contiguous()
    z = z if b is None else z.add_(b)
    # views of all steps at once: one by one they take as long as the arithmetic
    both, new, out = (part.unbind() for part in z.split((2 * H, H, H), 2))
    (i, f), hs, cs = (
        (part.unbind() for part in z[:, :, : 2 * H].split(H, 2)),
        h.unbind(),
        c.unbind(),
    )
    tanh = torch.empty_like(h0)
    for t, zt in enumerate(z.unbind()):
        zt.addmm_(hs[t], wt)
        both[t].sigmoid_()
        new[t].tanh_()
        out[t].sigmoid_()
        torch.mul(f[t], cs[t], out=cs[t + 1]).addcmul_(i[t], new[t])
        torch.mul(out[t], torch.tanh(cs[t + 1], out=tanh), out=hs[t + 1])
    return Pass(h, z, c)


def lstm_back(
    way: Pass, w: Tensor, dh: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the inputs' part and the states', [T, n, 4H], and of the first state and cell, [n, H].

    ``dh`` [T, n, H] and ``dc`` [n, H]: by the states and by the last cell.
    """
    H = way.h.shape[2]
    i, f, g, o = way.gates.split(H, 2)
    tanh = way.kept[1:].tanh()
    # what each gate's own derivative and its partner make, of all steps at once
    slope = torch.cat(
        [g * i * (1 - i), way.kept[:-1] * f * (1 - f), i * (1 - g * g), tanh * o * (1 - o)], 2
    )
    inner, d = o * (1 - tanh * tanh), torch.empty_like(way.gates)
    dc = torch.zeros_like(way.h[0]) if dc is None else dc.clone()
    dn, back = torch.zeros_like(way.h[0]), torch.empty_like(way.h[0])
    three, last = ([v.unbind() for v in t.split((3 * H, H), 2)] for t in (d, slope)), dc[:, None]
    (d3, d1), (s3, s1) = three
    dhs, inners, fs, n = dh.unbind(), inner.unbind(), f.unbind(), len(back)
    for t in range(len(d) - 1, -1, -1):
        torch.add(dhs[t], dn, out=back)
        dc.addcmul_(back, inners[t])
        torch.mul(last, s3[t].view(n, 3, H), out=d3[t].view(n, 3, H))
        torch.mul(back, s1[t], out=d1[t])
        dc.mul_(fs[t])
        torch.mm(d[t], w, out=dn)
    return d, d, dn, dc


def gru(z: Tensor, w: Tensor, b: Tensor | None, h0: Tensor, c0: Tensor) -> Pass:
    """Gates reset, update and new, of which the new one sees the state through the reset."""
    h, H, wt = torch.cat([h0[None], h0.new_empty(len(z), *h0.shape)]), h0.shape[1], w.T.contiguous()
    kept = torch.empty_like(h[1:])
    for t, zt in enumerate(z):
        own = h[t] @ wt if b is None else torch.addmm(b, h[t], wt)
        zt[:, : 2 * H].add_(own[:, : 2 * H]).sigmoid_()
        kept[t] = own[:, 2 * H :]
        r, u, new = zt.split(H, 1)
        new.addcmul_(r, kept[t]).tanh_()
        torch.lerp(new, h[t], u, out=h[t + 1])
    return Pass(h, z, kept)


def gru_back(
    way: Pass, w: Tensor, dh: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same of a GRU, [T, n, 3H], which has no cell."""
    H = way.h.shape[2]
    r, u, new = way.gates.split(H, 2)
    dn, of_inputs, of_states = torch.zeros_like(way.h[0]), *map(torch.empty_like, (way.gates,) * 2)
    for t in range(len(r) - 1, -1, -1):
        back = dh[t] + dn
        fresh = back * (1 - u[t]) * (1 - new[t] * new[t])
        di, ds = of_inputs[t], of_states[t]
        torch.mul(fresh * way.kept[t], r[t] * (1 - r[t]), out=di[:, :H])
        torch.mul(back * (way.h[t] - new[t]), u[t] * (1 - u[t]), out=di[:, H : 2 * H])
        di[:, 2 * H :] = fresh
        ds[:, : 2 * H] = di[:, : 2 * H]
        torch.mul(fresh, r[t], out=ds[:, 2 * H :])
        dn = torch.addmm(back * u[t], ds, w)
    return of_inputs, of_states, dn, None


def rnn(
    activation: Callable[[Tensor], Tensor],
    z: Tensor,
    w: Tensor,
    b: Tensor | None,
    h0: Tensor,
    c0: Tensor,
) -> Pass:
    """One gate, which is the new state."""
    h, wt = torch.cat([h0[None], h0.new_empty(len(z), *h0.shape)]), w.T.contiguous()
    z = z if b is None else z.add_(b)
    for t, zt in enumerate(z):
        h[t + 1] = activation(zt.addmm_(h[t], wt))
    return Pass(h, z, h)


def rnn_back(
    slope: Callable[[Tensor], Tensor], way: Pass, w: Tensor, dh: Tensor, dc: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same of a plain cell, [T, n, H]."""
    slopes, d, dn = slope(way.h[1:]), torch.empty_like(way.gates), torch.zeros_like(way.h[0])
    for t in range(len(d) - 1, -1, -1):
        torch.mul(dh[t] + dn, slopes[t], out=d[t])
        dn = d[t] @ w
    return d, d, dn, None


CELLS: dict[str, tuple[Callable[..., Pass], Callable[..., Any]]] = {
    "LSTM": (lstm, lstm_back),
    "GRU": (gru, gru_back),
    "RNN_TANH": (partial(rnn, torch.tanh), partial(rnn_back, lambda h: 1 - h * h)),
    "RNN_RELU": (partial(rnn, torch.relu), partial(rnn_back, lambda h: (h > 0).to(h))),
}
"""By PyTorch's names: forward and back."""


class Through(torch.autograd.Function):
    """A layer in one direction: inputs [T, n, E], first state and cell -> states [T, n, H], last cell."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, h0: Tensor, c0: Tensor, anchor: Tensor, weights: Any, cell: Any
    ) -> tuple[Tensor, Tensor]:
        """``weights``: of inputs and states, and their biases; ``anchor`` asks for gradients."""
        w, u, b, own = weights
        ctx.cell, ctx.weights = cell, weights
        ctx.save_for_backward(x)
        ctx.way = CELLS[cell.mode][0](F.linear(x, w, b), u, own, h0, c0)
        return ctx.way.h[1:].clone(), ctx.way.kept[-1].clone()

    @staticmethod
    def backward(ctx: Any, dh: Tensor, dc: Tensor) -> tuple[Tensor | None, ...]:
        """Tell of the examples' gradients, and go on to inputs and first states."""
        (x,), (w, u, _, _) = ctx.saved_tensors, ctx.weights
        states = ctx.way.h[:-1]
        of_inputs, of_states, dh0, dc0 = CELLS[ctx.cell.mode][1](ctx.way, u, dh, dc)
        made: tuple[Callable[[], Tensor], ...] = (
            lambda: product(of_inputs, x),
            lambda: product(of_states, states),
            lambda: of_inputs.sum(0),
            lambda: of_states.sum(0),
        )
        ctx.cell.heard(dict(zip((n + ctx.cell.end for n in PARTS), made, strict=True)))
        ctx.way = None
        return of_inputs @ w if ctx.needs_input_grad[0] else None, dh0, dc0, None, None, None


@dataclass(frozen=True)
class Cell:
    """Which of the four kinds, how its parameters' names end, and who hears of their gradients."""

    mode: str
    end: str
    heard: Heard


def product(d: Tensor, rows: Tensor) -> Tensor:
    """Outer products summed over time: [T, n, out] and [T, n, in] -> [n, out, in]."""
    return torch.bmm(d.permute(1, 2, 0), rows.transpose(0, 1))


def recurrent(m: Any, anchor: Tensor, heard: Heard) -> Callable[..., Any]:
    """A forward for an LSTM, GRU or RNN that gives what the layer's own gives, and tells of gradients."""

    def forward(input: Any, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            raise NotImplementedError(
                f"{m._get_name()} takes packed sequences, of which each example's part cannot be told: "
                "give padded ones, and take its outputs at their lengths"
            )
        if input.dim() != 3:
            raise NotImplementedError(
                f"{m._get_name()} takes a sequence without an axis of examples"
            )
        seq = input.transpose(0, 1) if m.batch_first else input
        sides, two = 2 if m.bidirectional else 1, m.mode == "LSTM"
        zeros = seq.new_zeros(m.num_layers * sides, seq.shape[1], m.hidden_size)
        first, cells = (hx if two else (hx, zeros)) if hx is not None else (zeros, zeros)
        last, ends = [], []
        for k in range(m.num_layers):
            if k and m.dropout:
                seq = F.dropout(seq, m.dropout, m.training)
            outs = []
            for back in range(sides):
                end, place = f"_l{k}" + "_reverse" * back, k * sides + back
                weights = [getattr(m, n + end, None) for n in PARTS]
                told = Cell(m.mode, end, heard)
                given = seq.flip(0) if back else seq
                out, c = Through.apply(given, first[place], cells[place], anchor, weights, told)
                last.append(out[-1])
                ends.append(c)
                outs.append(out.flip(0) if back else out)
            seq = torch.cat(outs, 2) if back else out
        out = seq.transpose(0, 1) if m.batch_first else seq
        return out, (torch.stack(last), torch.stack(ends)) if two else torch.stack(last)

    return forward


PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def odd(m: Any) -> str | None:
    """Why a layer is none of these; None where it is."""
    if m.proj_size:
        return f"{m._get_name()} with proj_size has no formula"
    return None
