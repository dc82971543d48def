"""Models that void a privacy claim: refused by layer, with the fix; and the fix itself."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fedtorch.privacy.base import Privacy
from fedtorch.training.module import training
from fedtorch.training.outline import copied
from fedtorch.types import ConfigError

FIX = "; --privacy.fix-model true replaces it before round 0"


RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)
"""Layers whose inside no hook of Opacus can see; it has twins for them."""


def refuse(model: nn.Module) -> None:
    """Layers that keep or use statistics of many examples; all modules are looked at, frozen or not."""
    still = resting(model)
    for name, module in model.named_modules():
        where = f"layer {name or 'model'} ({type(module).__name__})"
        if isinstance(module, _BatchNorm) and module not in still:
            raise ConfigError(
                f"{where} mixes the examples of a batch and keeps statistics nobody noises: use "
                f"GroupNorm{FIX}"
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            raise ConfigError(
                f"{where} keeps statistics nobody noises: set track_running_stats=False{FIX}"
            )


def resting(model: nn.Module) -> set[nn.Module]:
    """BatchNorm in evaluation mode as clients train: its statistics neither use nor follow the data.

    Its owner left it so, or the model's own ``train`` does.
    """
    modes = [(m, m.training) for m in model.modules()]
    still = {m for m in training(model).modules() if isinstance(m, _BatchNorm) and not m.training}
    for m, was in modes:
        m.training = was
    return {m for m in still if m.running_mean is not None}


def fix_for(model: nn.Module) -> str:
    """The fix in words, where it has a layer that the fix would put another in the place of."""
    fixable = (isinstance(m, RECURRENT) or getattr(m, "inplace", False) for m in model.modules())
    return FIX if any(fixable) else ""


def renorming(model: nn.Module) -> None:
    """Embeddings that scale the rows they look up, in forward and so past clipping and noise."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ConfigError(
                f"layer {name or 'model'} ({type(module).__name__}) scales the rows that examples look up "
                "down to max_norm, which shows them past all noise: leave max_norm out"
            )


def narrow(model: nn.Module) -> None:
    """Norms, sums and noise in 16 bits are off by more than the claim has room for."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"parameter {name} is {str(p.dtype).removeprefix('torch.')}: clipping and noise need "
                "float32 at least; call model.float()"
            )


def tied(model: nn.Module) -> str | None:
    """Name of a parameter that two layers share, if there is one."""
    seen: dict[int, str] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if id(p) in seen:
            return name
        seen[id(p)] = name
    return None


def mended(model: nn.Module, plan: Privacy) -> nn.Module:
    """The model, or a fixed copy where the plan asks for one."""
    steps = plan.per_example
    return fixed(model, steps.mode if steps else "auto") if plan.fix_model else model


def fixed(model: nn.Module, mode: str = "hooks") -> nn.Module:
    """A copy with GroupNorm in place of BatchNorm.

    For a ``mode`` of Opacus, its LSTM, GRU and attention are put in the place of torch's too. In-place
    activations are switched off, since they would overwrite what per-example gradients need.
    """
    fixers: dict[type[nn.Module], Any] = {}
    if mode in ("hooks", "ghost"):
        from opacus.validators import ModuleValidator

        fixers = {k: v for k, v in ModuleValidator.FIXERS.items() if k in RECURRENT}
    model = copied(model)
    still = resting(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm) and name and module not in still:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, _group_norm(module))
        elif isinstance(module, _InstanceNorm) and module.track_running_stats:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
        elif type(module) in fixers and name:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fixers[type(module)](module))
        if getattr(module, "inplace", False):
            module.inplace = False
    return _group_norm(model) if isinstance(model, _BatchNorm) else model


def _group_norm(old: _BatchNorm) -> nn.GroupNorm:
    """As many groups as divide the channels, at most 32, with two channels or more in each.

    On plain features ([B, C]) a group of one channel would be constant, and BatchNorm1d gets one group.
    """
    channels = old.num_features
    most = 1 if isinstance(old, nn.BatchNorm1d) else min(32, channels // 2)
    groups = max((g for g in range(1, most + 1) if channels % g == 0), default=1)
    new = nn.GroupNorm(groups, channels, eps=old.eps, affine=old.affine)
    if old.affine:
        new.load_state_dict({"weight": old.weight.detach(), "bias": old.bias.detach()})
        new.to(old.weight.device)
    return new
