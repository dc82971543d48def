"""What an adversary sees of a round, taken from the real server: updates of clients, or only their mean."""

import warnings
from collections.abc import Sequence

from torch import nn

from fedtorch.client import Client
from fedtorch.engines import Local
from fedtorch.options import typed
from fedtorch.recipe import Recipe
from fedtorch.rounds.observers import Observer
from fedtorch.server import Server
from fedtorch.training.outline import copied
from fedtorch.types import ConfigError, Params, Released


class _Watch(Observer):
    """Keeps what each client sends."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.sent_by: dict[str, Params] = {}

    def sent(self, released: Released) -> None:
        """One row for each client."""
        for k, id in enumerate(released.ids):
            self.sent_by[id] = {n: v[k] for n, v in released.sent["delta"].items()}


def seen(
    model: nn.Module, clients: Sequence[Client], recipe: Recipe, seed: int = 0
) -> list[Params]:
    """What whoever is not trusted sees of one round from ``model``: each client's update, or their mean.

    The server is real, so what leaves it is what would leave it in a run. Where a plan trusts the server,
    or an aggregator hides updates from it, that is how the model moves.
    """
    watch = _Watch()
    mean = only_mean(recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a round's figures, which nobody reads
        server = Server(
            copied(model),
            clients,
            recipe,
            seed=seed,
            engine=Local(chunk=1),
            observers=() if mean else (watch,),
        )
        server.round()
    if mean and recipe.strategy.server is not None:
        raise ConfigError(
            "attack gradient reads the mean of clients off the model's step, which strategy.server "
            f"{typed(recipe.strategy.server)} makes of it: attack a run without strategy.server"
        )
    if lost := [c.id for c in clients if c.id not in watch.sent_by and not mean]:
        raise ConfigError(
            f"attack gradient: client {lost[0]} sent nothing, as its update is not finite: lower lr"
        )
    found = [server.last_step] if mean else [watch.sent_by[c.id] for c in clients]
    if not found[0]:
        raise ConfigError(
            "attack gradient: the round released nothing, as too few clients took part"
        )
    return found


def only_mean(recipe: Recipe) -> bool:
    """Whether nobody who is not trusted sees what one client sends."""
    return recipe.privacy.central or recipe.hides


def who_sees(recipe: Recipe) -> str:
    """Who sees what under the recipe's plan, in words."""
    if recipe.privacy.central:
        return "whoever gets the models, their noised mean (the server is trusted and sees plain updates)"
    if recipe.hides:
        return "the server, the noised sum alone"
    return "the server, each client's noised update"
