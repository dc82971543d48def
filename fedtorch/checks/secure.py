"""What cannot be had where nobody sees a client's own update, and what masks do not hide."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fedtorch.aggregation.mean import Aggregator
from fedtorch.options import typed
from fedtorch.recipe import Recipe
from fedtorch.rounds.observers import Observer, looks
from fedtorch.rounds.participation import Everyone, Participation
from fedtorch.rounds.threat import Threat
from fedtorch.types import ConfigError, Params


def check(
    recipe: Recipe,
    participation: Participation,
    clients: int,
    observers: Sequence[Observer],
    threat: Threat | None,
) -> list[str]:
    """Raises ConfigError where the aggregator secure cannot be had; notes on what it does not hide."""
    if not recipe.hides:
        return []
    rule: Any = recipe.aggregator
    name = typed(rule)
    rule.check(participation.most(clients), recipe.privacy)
    seen(recipe, observers)
    if threat is not None:
        raise ConfigError(
            f"threat and aggregator {name} do not go together: the sum is that of aggregator mean, which "
            "simulates the attack, and under masks no rule can find who lies; take aggregator mean, or "
            "leave threat out"
        )
    if participation == Everyone():
        return []
    return [
        f"aggregator {name} with a cohort that changes: from many rounds' sums, and who was in each, a "
        "server can work out single clients' updates (arXiv:2106.06089); participation everyone gives it "
        "no such differences"
    ]


def placed(recipe: Recipe, most: int, sent: Mapping[str, Params]) -> Recipe:
    """With a plan that knows, under masks, how many clients there are at ``most`` and how many numbers."""
    plan, masks = recipe.privacy, recipe.secure
    if masks is None or not plan.masked:
        return recipe
    numbers = sum(v.numel() for p in sent.values() for v in p.values())
    return replace(recipe, privacy=plan.placed(most, masks.fewest(most), numbers))


def seen(recipe: Recipe, observers: Sequence[Observer]) -> None:
    """Raises ConfigError where one looks at updates that the aggregator hides."""
    looking = [o for o in observers if looks(o)]
    if recipe.hides and looking:
        raise ConfigError(
            f"observer {type(looking[0]).__name__} looks at what clients send (sent), which aggregator "
            f"{typed(recipe.aggregator)} shows to nobody: leave the observer out, or take "
            "aggregator mean"
        )


def notes(recipe: Recipe, model: nn.Module, simulated: bool) -> list[str]:
    """What masks are in this run, and what of this model a sum still shows of one client."""
    chosen, told = recipe.strategy.weighting, recipe.privacy.weighting == "examples"
    alike = recipe.hides and chosen == "auto" and told and recipe.weighting == "uniform"
    cap = "; aggregator.weight_cap weighs them" if recipe.secure else ""
    said = [f"clients count alike, as none tells how many examples it has{cap}"] if alike else []
    if recipe.secure is None:
        return said
    if simulated:
        said.append(
            "aggregator secure: a simulation adds the same whole numbers without masks; bytes and seconds "
            "of masks are reckoned (docs/secure.md)"
        )
    if recipe.secure.neighbours is not None:
        said.append(
            "aggregator.neighbours holds against a server that follows the protocol and looks "
            "(semi-honest), not against one that lies"
        )
    if recipe.privacy.masked and recipe.secure.width > 32:
        said.append(
            "aggregator.width 32 would send half the bytes, and loses nothing under distributed privacy"
        )
    embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
    if recipe.privacy.claims or not embeds:
        return said
    return [
        *said,
        "aggregator secure: rows of an embedding that only one client's words touch appear in the sum as "
        "that client sent them; only noise hides them (--privacy)",
    ]


def hides(aggregator: Aggregator) -> bool:
    """Whether nobody sees the figures of a single client."""
    return getattr(aggregator, "hides", False)


def single(aggregator: Aggregator, validation: float, runs: int) -> None:
    """Raises ConfigError for options of a run that show figures of single clients.

    ``validation``: what share of each client's data judges the model; ``runs``: clients that are tracked.
    """
    shown = {"validation": validation, "tracking.client_runs": runs}
    if hides(aggregator) and (given := [k for k, v in shown.items() if v]):
        raise ConfigError(
            f"{given[0]} shows figures of single clients, and the aggregator hides them: leave it "
            "out, or take aggregator mean"
        )
