"""Clipped and noised gradients for one local step: the heart of DP-SGD.

Five ways lead to the same sum of clipped per-example gradients: ``stacked`` here (torch.func, K clients at
once), the others for one client after another in ``privacy/one_client.py``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from fedtorch.privacy.noise.keystream import Scratch
from fedtorch.privacy.noise.streams import Onto, Stream
from fedtorch.training.dropout import Drawing
from fedtorch.training.step import Stepping
from fedtorch.tree import exact_sq_norms, expand, filled, leaves, row, rows, size, split, tmap
from fedtorch.types import Params, Stack

ROOM = 1 << 28
"""Numbers that gradients of examples may have at once, where that can be had with less."""


@dataclass(frozen=True)
class PrivateSteps:
    """What a solver needs for private local steps of K clients.

    A solver sums each client's per-example gradients, each scaled by ``factors``, and hands the sum to
    ``finish``. An empty batch is a step like any other: its sum is zero.
    """

    clip: float
    """Clipping norm of one example's gradient."""
    noise: float
    """Noise multiplier: the noise on the sum has standard deviation noise x clip."""
    divisor: float
    """Public batch size."""
    streams: Sequence[Stream]
    """Noise, one stream for each client of the stack."""
    mode: str = "auto"
    max_batch: int = 512
    scratch: Scratch = field(default_factory=Scratch)
    drawing: Drawing = field(default_factory=lambda: Drawing(()))
    """Masks of dropout, where the clients train together."""

    def factors(self, sq_norms: Tensor) -> Tensor:
        """Squared norms -> min(1, clip / norm); an example that is not finite counts as nothing.

        Guarantee: no gradient times its factor is longer than ``clip``, where no norm is less than it is.
        They must be float64's: where squares vanish in float32 a gradient would pass unclipped.
        """
        scale = (self.clip * sq_norms.double().rsqrt()).clamp(max=1)
        return torch.where(sq_norms.isfinite(), scale, 0).to(sq_norms.dtype)

    def noisy(
        self,
        row: Tensor,
        k: int,
        times: float = 1.0,
        part: bool = False,
        onto: Onto | None = None,
    ) -> bool:
        """Add client k's noise, ``times`` as large, to its sum of gradients, [numbers], in place.

        ``part``: the row is none of a step's, as where noise is drawn for what examples see of it alone.
        ``onto``: as in ``Stream.add``; returns whether it took the row.
        """
        stream, std = self.streams[k], times * self.noise * self.clip
        if part:
            stream.add_part(row, std, self.scratch)
            return False
        return stream.add(row, std, self.scratch, onto)

    def finish(self, sums: Stack) -> Stack:
        """(sum + N(0, (noise clip)^2)) / divisor, [K, ...].

        Guarantee: a Gaussian release of multiplier ``noise`` for each example of sums that were clipped by
        ``factors``: adding or removing one moves them by ``clip`` at most.

        All parameters of a client are one draw: many small ones would each cost a call.
        """
        flat = self.released(torch.cat([v.reshape(len(v), -1) for v in sums.values()], 1))
        made = split(flat, {k: v.shape[1:] for k, v in sums.items()})
        return {k: v.to(sums[k].dtype) for k, v in made.items()}  # of mixed types, as each was

    def released(self, flat: Tensor) -> Tensor:
        """The same of sums that lie one after another in a client's row, [K, numbers], in place."""
        for k, own in enumerate(flat):
            self.noisy(own, k)
        return flat.div_(self.divisor)


def rounded(factors: Tensor, like: Tensor) -> Tensor:
    """Factors in a gradient's type; one that loses digits there would scale to no norm at all: 0."""
    there = factors.to(like)
    return torch.where(there < torch.finfo(like.dtype).tiny, 0, there)


def stacked_gradients(
    stepping: Stepping,
    params: Stack,
    rest: Stack,
    batch: Any,
    mask: Tensor,
    steps: PrivateSteps,
) -> tuple[Stack, Tensor]:
    """K clients' private gradients [K, ...] and per-example losses [K, B] from a batch [K, B, ...].

    Of it the examples in ``mask`` [K, B] count.
    """

    def one(params: Params, rest: Params, example: list[Tensor], k: Tensor, b: Tensor) -> Tensor:
        with steps.drawing.at(k, b):
            return stepping.losses(params, rest, filled(batch, [t[None] for t in example]))[0]

    fixed = {k: v.detach() for k, v in params.items()}
    total, losses = tmap(torch.zeros_like, fixed), []
    pieces = (t.split(steps.max_batch, 1) for t in (mask, *leaves(batch)))
    for real, *tensors in zip(*pieces, strict=True):
        kind = steps.drawing.begin(real)
        per_example = vmap(
            vmap(grad_and_value(one), (None, None, 0, None, 0), randomness=kind),
            (0, 0, 0, 0, None),
            randomness=kind,
        )
        grads, values = per_example(
            fixed, rest, tensors, *(torch.arange(n, device=mask.device) for n in real.shape)
        )
        sq = exact_sq_norms(*(g.flatten(0, 1) for g in grads.values())).view(real.shape)
        weight = torch.where(real, rounded(steps.factors(sq), values), 0)
        for k, g in grads.items():
            total[k] += torch.einsum("kb,kb...->k...", weight, counting(weight > 0, g, sq))
        losses.append(values)
    return steps.finish(total), torch.cat(losses, 1)


def in_parts(
    params: Mapping[str, Tensor],
    steps: PrivateSteps,
    batch: Any,
    numbers: int,
    add: Callable[[Any, Params], Tensor],
) -> Tensor:
    """Leave one client's private gradient of a batch in ``p.grad``; returns the mean loss (0 when empty).

    ``add(part, total)`` adds a part's clipped gradients to their sum, and returns its losses. It writes out
    ``numbers`` for each example.
    """
    first, shapes = next(iter(params.values())), {k: p.shape for k, p in params.items()}
    alike = all(p.dtype == first.dtype and p.device == first.device for p in params.values())
    flat = first.new_zeros(1, sum(p.numel() for p in params.values()) if alike else 0)
    total = split(flat[0], shapes) if alike else tmap(torch.zeros_like, dict(params))
    most = max(1, min(steps.max_batch, ROOM // max(numbers, 1)))
    losses = [
        add(rows(batch, part), total) for part in torch.arange(size(batch)).split(most) if len(part)
    ]
    if alike:
        steps.released(flat)
    else:
        total = row(steps.finish(expand(total)), 0)
    for k, p in params.items():
        p.grad = total[k]
    return torch.cat(losses).mean() if losses else torch.zeros(())


def counting(used: Tensor, grads: Tensor, sq_norms: Tensor) -> Tensor:
    """The gradients, and zeros for those that count as nothing where any is not finite."""
    # 0 x NaN is NaN, so what counts as nothing has to be nothing; rare, hence not always done
    if bool(sq_norms.isfinite().all()):
        return grads
    return torch.where(used.reshape(*used.shape, *[1] * (grads.dim() - used.dim())), grads, 0)
