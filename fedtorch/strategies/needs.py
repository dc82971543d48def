"""Refusals that strategies share: what has no room for a server optimizer, and what needs whole models."""

from torch import nn

from fedtorch.options import typed
from fedtorch.strategies.base import Strategy
from fedtorch.training.module import statistics
from fedtorch.types import ConfigError


def no_optimizer(strategy: Strategy, why: str, instead: str = "fedavg") -> None:
    """Raises ConfigError where a server optimizer would follow a step that leaves no room for it."""
    if strategy.server is not None:
        raise ConfigError(
            f"strategy {typed(strategy)} {why}: leave strategy.server out, or use {instead}"
        )


def whole_models(strategy: Strategy, model: nn.Module) -> None:
    """Raises ConfigError where a strategy of whole models meets personal parts, or running statistics."""
    who = f"strategy {typed(strategy)}"
    if strategy.personal:
        raise ConfigError(
            f"{who} has whole models beside the shared one: leave out strategy.personal, or use fedper"
        )
    if found := sorted(statistics(model)):
        raise ConfigError(
            f"{who} computes with weights, and model {type(model).__name__} also has running statistics "
            f"({found[0]}): use GroupNorm in place of BatchNorm, or strategy ditto"
        )
