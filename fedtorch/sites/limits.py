"""Limits of a site's work, whoever asks: size of model and batch, rounds, passes, steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration

from fedtorch.engines.wire import printable
from fedtorch.run import zoo
from fedtorch.sites import offer as plans
from fedtorch.sites.options import SiteConfig
from fedtorch.types import ConfigError

MOST_LAYERS = 5_000
"""Modules of a model; it is built before its size is known, and each takes time."""
DIVISORS = (1e-3, 1e9)
"""What the noised sum of a step may be divided by: beyond, no step is left or none is finite."""


def accept(table: dict[str, Any], config: SiteConfig) -> plans.Plan:
    """The plan in a table that arrived, if this site has what it names and does what it asks for.

    Raises ConfigError with one sentence for any other, whatever is in it.
    """
    try:
        plan = plans.read(table, config.models or zoo.names(), config.steps)
        check_work(plan, config)
        with torch.device("meta"), model_of_at_most(config.max_parameters):
            plan.outline()
    except ConfigError as e:  # it may quote what somebody else wrote
        raise ConfigError(printable(str(e))) from e
    except Exception as e:
        raise ConfigError(f"the plan cannot be built: {type(e).__name__}") from e
    return plan


def check_work(plan: plans.Plan, limits: SiteConfig) -> None:
    """Refuse a plan that asks for more than ``limits``, by name; raises ConfigError."""
    asked = [
        ("epochs", plan.epochs, "max_epochs"),
        ("steps", plan.steps, "max_steps"),
        ("batch_size", plan.batch_size, "max_batch"),
        ("accumulate", plan.accumulate * (plan.batch_size or 1), "max_batch"),
    ]
    if plan.privacy is not None:
        asked.append(("privacy.rounds", plan.privacy.rounds, "max_rounds"))
    if plan.privacy is not None and (steps := plan.privacy.per_example):
        asked.append(("privacy.steps", steps.steps, "max_steps"))
        asked.append(("privacy.max_batch", steps.max_batch, "max_batch"))
        if not DIVISORS[0] <= steps.batch_size <= DIVISORS[1]:
            raise ConfigError(
                f"privacy.batch_size must be between {DIVISORS[0]:g} and {DIVISORS[1]:g}, "
                f"got {steps.batch_size:g}"
            )
    for name, value, limit in asked:
        if value is not None and value > getattr(limits, limit):
            raise ConfigError(
                f"the run asks for {name} above this site's {limit} of {getattr(limits, limit):,}"
            )


@contextmanager
def model_of_at_most(parameters: int) -> Iterator[None]:
    """Building a model in here ends with a ConfigError as soon as it is too large."""
    numbers = layers = 0

    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        nonlocal numbers
        numbers += 0 if value is None else value.numel()
        if numbers > parameters:
            raise ConfigError(f"the model has more than this site's {parameters:,} parameters")

    def layer(module: nn.Module, name: str, value: nn.Module | None) -> None:
        nonlocal layers
        layers += 1
        if layers > MOST_LAYERS:
            raise ConfigError(f"the model has more than {MOST_LAYERS:,} layers")

    handles = [
        registration.register_module_parameter_registration_hook(parameter),
        registration.register_module_module_registration_hook(layer),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
