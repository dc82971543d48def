"""Clipping: what one client or example adds is scaled down to a norm."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedtorch.tree import finite_per_client, per_client, tmap
from fedtorch.types import ConfigError, Stack

AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Devices of which torch.autocast may be on."""

CLIPS = (1e-6, 1e9)
"""Clipping norms there may be: beyond them noise, or what is clipped, meets the ends of float32."""


def bounded(vectors: np.ndarray, norm: float) -> np.ndarray:
    """Vectors [n, m], each scaled down to ``norm`` at most; one that is not finite is zero."""
    lengths = np.sqrt((vectors * vectors).sum(1, keepdims=True))
    good = np.isfinite(lengths)
    return np.where(good, vectors, 0) * np.where(good, norm / np.maximum(lengths, norm), 0)


def check_clip(name: str, clip: float) -> None:
    """Refuse clipping norms at the ends of float32."""
    least, most = CLIPS
    if not least <= clip <= most:
        raise ConfigError(f"{name} must be between {least:g} and {most:g}, got {clip}")


def rounds_short() -> bool:
    """Whether torch was told to round float32 products to fewer digits, which no clip in float32 bounds."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # told of one kind of product alone, as from torch 2.9 on
        places = torch.backends.cuda.matmul, cast(Any, torch.backends.mkldnn).matmul
        return any(p.fp32_precision not in ("none", "ieee") for p in places)


def check_products() -> None:
    """Refuse clipped sums of gradients that are taken in such products, or in 16 bits."""
    if rounds_short():
        raise ConfigError(
            "sample-level privacy sums clipped gradients in float32, and torch was told to round its "
            "products to fewer digits, beyond what clipping bounds: call "
            'torch.set_float32_matmul_precision("highest")'
        )
    if any(torch.is_autocast_enabled(device) for device in AUTOCAST):
        raise ConfigError(
            "sample-level privacy sums clipped gradients in float32, and torch.autocast around the "
            "training would round them to 16 bits, beyond what clipping bounds: train outside of it"
        )


def joint_norms(sent: dict[str, Stack], order: int = 2) -> Tensor:
    """L1 or L2 norm of each client's groups together, [K], in float64."""
    flat = [v.double().reshape(len(v), -1) for stack in sent.values() for v in stack.values()]
    if order == 1:
        return torch.stack([f.abs().sum(1) for f in flat]).sum(0)
    return torch.stack([f.square().sum(1) for f in flat]).sum(0).sqrt()


def clipped(
    sent: dict[str, Stack], norms: Tensor, clip: float, scale: Tensor | None = None
) -> dict[str, Stack]:
    """Scale each client's groups together down to norm ``clip``, then by ``scale`` in [0, 1].

    Guarantee: the joint norm of every client is at most ``clip``; a client with any number that is not
    finite (or a norm beyond float64) sends zero.
    """
    good = torch.stack([finite_per_client(s) for s in sent.values()]).all(0) & norms.isfinite()
    factor = torch.where(good, clip / norms.clamp(min=clip), 0)
    factor = factor if scale is None else factor * scale.to(factor)
    return {
        g: tmap(lambda v: torch.where(per_client(good, v), v * per_client(factor, v), 0), s)
        for g, s in sent.items()
    }
