"""What of a server's model travels: what is trained, and what else clients were not given so."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedtorch.checks.model import trainable
from fedtorch.engines.messages import digest
from fedtorch.recipe import Recipe
from fedtorch.training.module import CPU, load, snapshot, statistics, to
from fedtorch.training.personal import personal, shared
from fedtorch.tree import alike
from fedtorch.types import ConfigError, Params


class Weights:
    """A model's parameters and buffers on the CPU, wherever it is, beside those that it was handed with.

    A buffer that a forward made is nobody's; of one that it made larger, the first is.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        """Raises ConfigError naming what nothing here can train or average."""
        patterns = recipe.strategy.personal
        own, names = personal(model, patterns), shared(model, patterns)
        trainable(model)
        self.model = model
        self.first: Params = to(snapshot(model), CPU)
        self.trained = {k: self.first[k] for k in names}
        """Those that are trained and everybody's, as they were handed over."""
        averaged = statistics(model) - own if recipe.privacy.statistics else set()
        self._sent = {*names} | averaged
        self._shapes = _shapes(model)
        self._digests: dict[tuple[str, ...], str] = {}
        self.aside: tuple[Params, Params] | None = None
        """Weights that are shown in the place of the last round's, and those."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the first that is trained."""
        first: Tensor = next(iter(self.trained.values()))
        return first.dtype

    def unchanged(self) -> None:
        """Refuse a model whose parameters are no longer those that the engine was given a copy of."""
        before, now = self._shapes, _shapes(self.model)
        if now == before:
            return
        name = next(k for k in {**before, **now} if now.get(k) != before.get(k))
        was, what = before.get(name), now.get(name)
        how = "is new" if was is None else "is gone" if what is None else "has another shape"
        if was and what and was[0] == what[0]:
            how = "was unfrozen" if what[1] else "was frozen"
            how = f"became {what[2]}" if was[2] != what[2] else how
        raise ConfigError(
            f"parameter {name} of server.model {how} after Server() was made, and clients still train "
            "the model as it was then: make a new Server with the changed model"
        )

    def now(self) -> Params:
        """As they are, not copied where the model is on the CPU."""
        model = (*self.model.named_parameters(), *self.model.named_buffers())
        now = {k: v.detach().to(CPU) for k, v in model}
        return {k: now[k] if now[k].shape == v.shape else v for k, v in self.first.items()}

    def copied(self) -> Params:
        """A copy of them."""
        return {k: v.clone() for k, v in self.now().items()}

    def show(self, weights: Params) -> None:
        """Put other weights into the model; what travels and is saved is what was in it before."""
        self.seen()
        last = self.aside[1] if self.aside else self.copied()
        load(self.model, {k: weights[k] for k in last})
        self.aside = (self.copied(), last)

    def seen(self) -> None:
        """Whether what is shown still is in the model: what somebody else has put there is to stay."""
        if self.aside and not all(alike(v, self.aside[0][k]) for k, v in self.now().items()):
            self.aside = None

    def back(self) -> None:
        """The weights of the last round again."""
        self.seen()
        if self.aside:
            load(self.model, self.aside[1])
            self.aside = None

    def moved(self) -> bool:
        """Whether any that is trained is no longer what it was."""
        now = self.now()
        return any(not torch.equal(now[k], v) for k, v in self.trained.items())

    def travel(self) -> Params:
        """A copy of what clients do not have with the model."""
        self.seen()
        now, first = self.aside[1] if self.aside else self.now(), self.first
        return {k: v.clone() for k, v in now.items() if k in self._sent or not alike(v, first[k])}

    def state_dict(self) -> dict[str, Any]:
        """What has changed or will, and a digest of the rest."""
        model = self.travel()
        return {"model": model, "base": self._rest(model)}

    def check(self, state: Mapping[str, Any]) -> Params:
        """All weights of a checkpoint; raises ConfigError when it belongs to another model."""
        first = self.first
        model: Params = first | state["model"]
        for k, v in model.items():
            if k not in first or first[k].shape != v.shape:
                raise ConfigError(f"the checkpoint is of another model: {k!r} does not match")
        if "base" in state and state["base"] != self._rest(state["model"]):
            raise ConfigError(
                "the checkpoint is of another model: its frozen weights or constants are not these; make "
                "the Server with the model as it was before training"
            )
        return model

    def _rest(self, model: Params) -> str:
        """Digest of the model as it was handed over, but for what ``model`` has."""
        rest = tuple(k for k in self.first if k not in model)
        if rest not in self._digests:  # they are the same from round to round
            self._digests[rest] = digest({k: self.first[k] for k in rest})
        return self._digests[rest]


def _shapes(model: nn.Module) -> dict[str, tuple[torch.Size, bool, torch.dtype]]:
    """Shape of each parameter, whether it is trained, and its type."""
    return {k: (p.shape, p.requires_grad, p.dtype) for k, p in model.named_parameters()}
