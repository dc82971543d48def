"""nn.MultiheadAttention with its projections in the open, so that each example's gradients can be told."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtorch.privacy.formulas import Heard

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class Projected(torch.autograd.Function):
    """Query, key and value [n, rows, in] through their matrices."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, anchor: Tensor, m: Any, heard: Heard
    ) -> tuple[Tensor, ...]:
        """``anchor`` asks for gradients in the weights' place."""
        ctx.save_for_backward(q, k, v)
        ctx.m, ctx.heard = m, heard
        biases = [None] * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        return tuple(F.linear(*t) for t in zip((q, k, v), matrices(m), biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor | None, ...]:
        """Tell of the examples' gradients, and go on to the inputs."""
        taken = ctx.saved_tensors

        def each(k: int) -> Tensor:
            return d[k].mT.bmm(taken[k])

        made: dict[str, Callable[[], Tensor]] = {
            "in_proj_weight": lambda: torch.cat([each(k) for k in range(3)], 1),
            "in_proj_bias": lambda: torch.cat([g.sum(1) for g in d], 1),
        }
        ctx.heard(made | {name: partial(each, k) for k, name in enumerate(SEPARATE)})
        asked = zip(d, matrices(ctx.m), ctx.needs_input_grad, strict=False)
        return *(g @ w if wanted else None for g, w, wanted in asked), None, None, None


def matrices(m: Any) -> tuple[Tensor, ...]:
    """Of query, key and value."""
    if m.in_proj_weight is not None:
        return tuple(m.in_proj_weight.chunk(3))
    return tuple(getattr(m, name) for name in SEPARATE)


def attention(m: Any, anchor: Tensor, heard: Heard) -> Callable[..., Any]:
    """A forward for the layer that gives what its own gives, and tells of gradients."""

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint that the mask is
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise NotImplementedError("attention over a sequence without an axis of examples")
        given = [t if m.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        q, k, v = (
            t.unflatten(2, (m.num_heads, -1)).transpose(1, 2)
            for t in Projected.apply(*given, anchor, m, heard)
        )
        mask = additive(q, attn_mask, key_padding_mask)
        weights, rate = None, m.dropout if m.training else 0.0
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.mT
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), rate)
            seen = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            seen = F.scaled_dot_product_attention(q, k, v, mask, rate)
        out = m.out_proj(seen.transpose(1, 2).flatten(2))
        # in memory as the layer's own lies: by that order dropout behind it draws
        out = out.transpose(0, 1).contiguous()
        return out.transpose(0, 1) if m.batch_first else out, weights

    return forward


def additive(q: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
    """Both masks as what is added to scores [n, heads, rows, columns]: -infinity where a mask is true."""
    found = None
    if mask is not None:
        found = mask.view(len(q), -1, *mask.shape[1:]) if mask.dim() == 3 else mask
    parts = [
        p for p in (found, None if padding is None else padding[:, None, None]) if p is not None
    ]
    adds = [
        q.new_zeros(p.shape).masked_fill(p, -math.inf) if p.dtype == torch.bool else p
        for p in parts
    ]
    return sum(adds[1:], adds[0]) if adds else None


def odd(m: Any) -> str | None:
    """Why a layer has no formula; None where it has."""
    if m.bias_k is not None or m.add_zero_attn:
        return f"{m._get_name()} with add_bias_kv or add_zero_attn has no formula"
    return None
