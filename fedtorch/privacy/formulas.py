"""Each example's gradient of a layer's weights, from what the layer took and from what came back to it.

Of a layer that looks at each example alone, both have a row for each example, so that one batched product
gives all the examples' gradients: no more arithmetic than the gradient of the whole batch.
"""

import math
from collections.abc import Callable, Container
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import grad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedtorch.types import Params

Gradient = Callable[..., Params]
"""Layer, inputs [n, ...], gradients of outputs [n, ...], names or None for all -> by name, [n, ...]."""

Grads = dict[Tensor, Tensor]
"""By parameter: its gradient of each example, [n, ...]."""

Names = Container[str] | None

Heard = Callable[[dict[str, Callable[[], Tensor]]], None]
"""Who is told of the gradients [n, ...] of a call, by name; each is made if it is asked for."""


NARROW = 8
"""Outputs for each input from which on a linear layer has few of them."""


NARROW_WINDOW = 32
"""Numbers of a window up to which a convolution's are written down, as a first one's are (W5, W7)."""

FEW_PLACES = 64
"""Places up to which they are, of ``MANY_CHANNELS``: 256 channels of 8 x 8 take a third of the time."""

MANY_CHANNELS = 16


def unlike(layer: nn.Module) -> str | None:
    """Why there is no formula for this layer; None where there is one."""
    if type(layer) not in GRADIENTS:
        return f"{layer._get_name()} has no formula"
    for option in ("scale_grad_by_freq", "sparse", "max_norm", "track_running_stats"):
        if getattr(layer, option, None):
            return f"{layer._get_name()} with {option} has no formula"
    return None


CONVOLUTIONS = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}
"""By axes: gradient of a convolution's weight."""


def convolution(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """One product of windows and places, or the examples as groups of channels of a single one.

    The second is one call too, and unfolds no inputs in memory.
    """
    m, n = cast(nn.Conv2d, m), len(x)

    def weight() -> Tensor:
        if few_windows(m, d):
            written = d.flatten(2).bmm(windows(m, x))
            return written.view(n, m.out_channels, *m.kernel_size, -1).movedim(-1, 2)
        seen, padding = padded(m, x)
        each: Tensor = CONVOLUTIONS[x.dim() - 2](
            seen.reshape(1, -1, *seen.shape[2:]),
            (n * m.out_channels, *m.weight.shape[1:]),
            d.reshape(1, -1, *d.shape[2:]),
            m.stride,
            padding,
            m.dilation,
            n * m.groups,
        )
        return each.view(n, *m.weight.shape)

    return _asked(m, names, weight=weight, bias=lambda: d.flatten(2).sum(2))


def few_windows(m: Any, d: Tensor) -> bool:
    """Whether windows are so narrow or so few that to write them down costs less than many groups do."""
    size = math.prod(m.kernel_size)
    narrow = size == 1 or m.in_channels * size <= NARROW_WINDOW
    few = math.prod(d.shape[2:]) <= FEW_PLACES and m.in_channels >= MANY_CHANNELS
    return m.groups == 1 and (narrow or few)


def windows(m: Any, x: Tensor) -> Tensor:
    """What a convolution takes at each place, [n, places, kernel x channels]."""
    seen, padding = padded(m, x)
    if any(padding):
        seen = F.pad(seen, [side for p in reversed(padding) for side in (p, p)])
    seen, axes, many = seen.movedim(1, -1), len(padding), m.in_channels >= MANY_CHANNELS
    seen = seen.contiguous() if many else seen  # copied below in runs of channels, or of places
    for axis in range(axes):
        reach = m.dilation[axis] * (m.kernel_size[axis] - 1) + 1
        seen = seen.unfold(axis + 1, reach, m.stride[axis])[..., :: m.dilation[axis]]
    seen = seen.movedim(axes + 1, -1)
    if many:
        return seen.flatten(axes + 1).flatten(1, axes)
    order = (0, *range(axes + 1, 2 * axes + 2), *range(1, axes + 1))
    return seen.permute(order).flatten(axes + 2).flatten(1, axes + 1).mT


def transposed(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """A convolution's, where what goes in and what comes back have changed places."""
    m, n = cast(nn.ConvTranspose2d, m), len(x)

    def weight() -> Tensor:
        each: Tensor = CONVOLUTIONS[x.dim() - 2](
            d.reshape(1, -1, *d.shape[2:]),
            (n * m.in_channels, *m.weight.shape[1:]),
            x.reshape(1, -1, *x.shape[2:]),
            m.stride,
            m.padding,
            m.dilation,
            n * m.groups,
        )
        return each.view(n, *m.weight.shape)

    return _asked(m, names, weight=weight, bias=lambda: d.flatten(2).sum(2))


def padded(m: Any, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What a convolution sees, and the zeros that are still to be put on both sides of each axis."""
    none = (0,) * (x.dim() - 2)
    if m.padding_mode != "zeros" or m.padding == "same":
        mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
        return F.pad(x, m._reversed_padding_repeated_twice, mode), none
    return x, none if m.padding == "valid" else m.padding


def linear(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Outer products, summed over what is neither example nor feature."""
    x, d = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, d))
    # of a few inputs and many outputs the product of the other order takes a third of the time
    turned = NARROW * x.shape[2] < d.shape[2]

    def weight() -> Tensor:
        return x.mT.bmm(d).mT if turned else d.mT.bmm(x)

    return _asked(m, names, weight=weight, bias=lambda: d.sum(1))


def embedding(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """The gradient of each place goes to the row that was looked up there."""
    m = cast(nn.Embedding, m)
    n, (rows, width) = len(x), m.weight.shape
    if m.padding_idx is not None:
        d = torch.where((x == m.padding_idx)[..., None], 0, d)
    place = x.reshape(n, -1) + torch.arange(n, device=x.device)[:, None] * rows
    out = d.new_zeros(n * rows, width).index_add_(0, place.flatten(), d.reshape(-1, width))
    return {"weight": out.view(n, rows, width)}


def group_norm(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Of scale and shift, summed over all but channels."""
    m = cast(nn.GroupNorm, m)
    return _channels(m, lambda: F.group_norm(x, m.num_groups, None, None, m.eps), d, names)


def instance_norm(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Likewise."""
    eps = cast(nn.InstanceNorm2d, m).eps
    return _channels(m, lambda: F.instance_norm(x, eps=eps), d, names)


def layer_norm(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Of scale and shift, summed over what is not normalized."""
    m = cast(nn.LayerNorm, m)
    shape = m.normalized_shape
    return _summed(m, lambda: F.layer_norm(x, shape, None, None, m.eps), d, names)


def rms_norm(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Likewise, of scale alone."""
    m = cast(nn.RMSNorm, m)
    return _summed(m, lambda: F.rms_norm(x, m.normalized_shape, None, m.eps), d, names)


def prelu(m: nn.Module, x: Tensor, d: Tensor, names: Names = None) -> Params:
    """Of slopes, for each channel or for all, summed over what is below zero."""
    m = cast(nn.PReLU, m)
    shape = (len(x), m.num_parameters, -1)
    return _asked(m, names, weight=lambda: torch.where(x < 0, d * x, 0).reshape(shape).sum(2))


def _summed(m: Any, normal: Callable[[], Tensor], d: Tensor, names: Names) -> Params:
    axes = d.dim() - len(m.normalized_shape)

    def summed(v: Tensor) -> Tensor:
        return v.reshape(len(v), -1, *v.shape[axes:]).sum(1)

    return _asked(m, names, weight=lambda: summed(d * normal()), bias=lambda: summed(d))


def _channels(m: nn.Module, normal: Callable[[], Tensor], d: Tensor, names: Names) -> Params:
    def summed(v: Tensor) -> Tensor:
        return v.reshape(*v.shape[:2], -1).sum(2)

    return _asked(m, names, weight=lambda: summed(d * normal()), bias=lambda: summed(d))


def _asked(m: nn.Module, names: Names, **made: Callable[[], Tensor]) -> Params:
    """Those that the layer has and that are asked for."""
    has = m._parameters
    return {
        k: make()
        for k, make in made.items()
        if has.get(k) is not None and (names is None or k in names)
    }


CONVOLUTIONAL = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Those that take windows."""

GRADIENTS: dict[type[nn.Module], Gradient] = {
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed,
    nn.ConvTranspose2d: transposed,
    nn.ConvTranspose3d: transposed,
    nn.Linear: linear,
    NonDynamicallyQuantizableLinear: linear,  # the last of nn.MultiheadAttention
    nn.Embedding: embedding,
    nn.GroupNorm: group_norm,
    nn.InstanceNorm1d: instance_norm,
    nn.InstanceNorm2d: instance_norm,
    nn.InstanceNorm3d: instance_norm,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: rms_norm,
    nn.PReLU: prelu,
}
