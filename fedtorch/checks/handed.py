"""What a server is handed: clients with names of their own, and parts that go together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from fedtorch.channel.base import bytes_of
from fedtorch.checks import combination, secure
from fedtorch.client import Client
from fedtorch.options import fit, shown, typed
from fedtorch.recipe import Recipe
from fedtorch.rounds.observers import Observer
from fedtorch.rounds.participation import Participation
from fedtorch.rounds.synchronous import Rounds, counted
from fedtorch.rounds.threat import Attacked, Threat, attacked
from fedtorch.strategies import lora
from fedtorch.tree import nbytes
from fedtorch.types import ConfigError, Params


def names(clients: Sequence[Any]) -> list[str]:
    """The clients' ids; raises ConfigError where there are none, or where one is there twice."""
    if odd := [c for c in clients if not hasattr(c, "id")]:
        raise ConfigError(f"each of the clients must be a Client, got {shown(odd[0])}")
    if not clients:
        raise ConfigError("there are no clients")
    ids = [c.id for c in clients]
    if twice := [i for i, n in Counter(ids).items() if n > 1]:
        raise ConfigError(f"client ids must differ, but {twice[0]!r} is there twice")
    return ids


BEGUN = ("aggregator", "memory", "optimizer")
"""Parts of a checkpoint that are filled by the rounds: one of an earlier round has less of them."""


def same_parts(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a checkpoint has what a server has ``now``, in the same types and shapes.

    But for its model and its plan, which have checks of their own, and what it may be without: the digest
    of what it leaves out, what observers keep, and what later rounds began.
    """
    for name, value in now.items():
        if name in ("base", "observers"):
            continue
        if name not in saved:
            if name in BEGUN:
                continue
            raise ConfigError(f"the checkpoint has no {name!r}: another version wrote it")
        if name not in ("model", "privacy") and (odd := _odd(name, value, saved[name])):
            raise ConfigError(
                f"the checkpoint's {odd} is not what this run keeps there: another version wrote it, or it "
                "was edited"
            )


def _odd(name: str, now: Any, saved: Any) -> str:
    """Where two nestings differ, by name; empty: nowhere."""
    if isinstance(now, Mapping):
        if not isinstance(saved, Mapping):
            return name
        later = name.partition(".")[0] in BEGUN
        both = {k: v for k, v in now.items() if k in saved or not later}
        return next(
            filter(None, (_odd(f"{name}.{k}", v, saved.get(k)) for k, v in both.items())), ""
        )
    if isinstance(now, Tensor):
        return "" if isinstance(saved, Tensor) and saved.shape == now.shape else name
    if isinstance(now, int):
        return "" if type(saved) is int and saved >= 0 else name
    return ""


def sizes(clients: Sequence[Any]) -> list[int] | None:
    """How many examples each has; None: they are elsewhere, and their server knows the names alone."""
    return [len(c) for c in clients] if all(hasattr(c, "__len__") for c in clients) else None


def with_liars(
    recipe: Recipe,
    clients: Sequence[Client],
    participation: Participation,
    pace: Rounds,
    observers: Sequence[Observer],
    threat: Threat | None,
    seed: int,
) -> tuple[Recipe, Sequence[Client], list[str]]:
    """Recipe and clients with the liars among them, and notes on what masks do not hide.

    Raises ConfigError where these do not go together.
    """
    participation.check(len(clients))
    combination.check(recipe, participation, pace)
    if not recipe.aggregator.linear:
        from fedtorch.aggregation.rows import Robust  # rules are few runs'

        if isinstance(recipe.aggregator, Robust):
            most = counted(pace, participation.most(len(clients)))
            recipe.aggregator.check(most, [c.id for c in clients])
    said = secure.check(recipe, participation, len(clients), observers, threat)
    if threat is not None:
        recipe, clients = attacked(recipe, clients, fit("threat", threat, Threat), seed)
        combination.check(recipe, participation, pace)
    strategy = combination.left_to_pace(recipe.strategy, pace)
    return replace(recipe, strategy=strategy), clients, said


def notes(
    model: nn.Module,
    recipe: Recipe,
    sent: dict[str, Params],
    coded: Mapping[str, Params],
    clients: Sequence[Any],
) -> list[str]:
    """What is to be said of model and recipe.

    ``sent``: what a client sends, in names and shapes; ``coded``: what of it a channel encodes.
    """
    found = lora.notes(model, recipe.strategy)
    lightning = hasattr(model, "training_step") and hasattr(model, "configure_optimizers")
    if lightning and recipe.step is None and recipe.local is None:
        found.append(
            f"training_step and configure_optimizers of model {type(model).__name__} are not used: "
            "clients train its forward by the recipe's loss and optimizer (docs/own.md: A step of your own)"
        )
    if recipe.privacy.fix_model:
        found.append(
            "privacy.fix_model: server.model is a copy, without the layers that void the guarantee"
        )
    if recipe.strategy.personal:
        found.append(
            "strategy.personal: each client keeps weights of its own; server.model has the shared ones "
            "and those that clients start with, and a client's own model is server.model_of(id); test "
            "figures are of server.model"
        )
    elif recipe.strategy.keeps:
        found.append(
            "each client keeps a model of its own, server.model_of(id); server.model is the shared one, "
            "and test figures are of it"
        )
    if coded:
        whole = nbytes(v for p in coded.values() for v in p.values())
        small = bytes_of(recipe.channel, coded)
        found.append(f"channel: a client sends {small:,} bytes a round in place of {whole:,}")
    if not recipe.aggregator.linear:
        each = nbytes(v for p in sent.values() for v in p.values())
        rule: Any = recipe.aggregator
        who = typed(rule)
        if isinstance(rule, Attacked):
            who = f"threat {typed(rule.threat)}"
            found += _of_liars(rule, who, len(clients))
        found.append(
            f"{who} keeps every client's update until the round ends: up to "
            f"{len(clients) * each / 1e6:,.1f} MB"
        )
    return [*found, *secure.notes(recipe, model, simulated=sizes(clients) is not None)]


def _of_liars(attack: Attacked, who: str, clients: int) -> list[str]:
    """An attack that does nothing, and a rule that is not told of all who lie."""
    rule, lie = cast(Any, attack.rule), len(attack.who)
    found = [f"{who}: {why}"] if (why := attack.threat.idle(clients)) else []
    told = getattr(rule, "f", 0)
    if told < lie and (told or getattr(rule, "pre", None)):
        found.append(f"{who}: {lie} lie, and aggregator.f makes {typed(rule)} ready for {told}")
    return found
