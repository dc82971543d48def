"""Low-rank adapters W + s B A averaged rightly: mean(B) mean(A) is not mean(BA).

Three ways out: only B is trained, A and B are trained in turn, or what the means leave out is added to W.
Layers are those of ``peft``, or any with ``lora_A``, ``lora_B``, ``scaling`` and ``base_layer`` like them.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fedtorch.strategies.base import FedAvg, Strategy
from fedtorch.strategies.needs import no_optimizer
from fedtorch.types import ConfigError, Params, Stack

TURN = "turn"
"""The group in which RoLoRA's server says how many rounds have moved the model."""


@dataclass(frozen=True, kw_only=True)
class FFALoRA(Strategy):
    """Only B is trained, A stays as it was drawn (Sun et al. 2024, arXiv:2403.12313).

    The mean of B is the mean of BA, half the bytes travel, and noise on B is noise on W: the one to take
    under privacy.
    """

    def prepare(self, model: nn.Module) -> Strategy:
        """Freeze every A; raises ConfigError where there is none."""
        freeze(model)
        return self


@dataclass(frozen=True, kw_only=True)
class RoLoRA(Strategy):
    """B and A are trained in turn, a round each, B first (Chen et al. 2025, arXiv:2502.01755).

    With the other half alike everywhere, the mean of this half is the mean of BA. Half the bytes go up.
    """

    def __post_init__(self) -> None:
        """Refuse a server optimizer, whose memory would move the half that rests."""
        super().__post_init__()
        no_optimizer(self, "takes the clients' means as they are", "ffalora")

    def prepare(self, model: nn.Module) -> Strategy:
        """Raises ConfigError where there is nothing to take turns."""
        _both(model, "RoLoRA")
        return self

    def init(self, params: Params) -> dict[str, Params]:
        """Whose turn it is."""
        return {TURN: {TURN: torch.zeros(())}}

    def rests(self, names: Iterable[str], extras: dict[str, Params]) -> set[str]:
        """The half whose turn it is not."""
        half = "lora_B" if int(extras[TURN][TURN]) % 2 else "lora_A"
        return {n for n in names if half in n.split(".")}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """The mean of this half; the other stays, whatever noise says of it."""
        rest = self.rests(mean["delta"], extras)
        moved = {k: v for k, v in mean["delta"].items() if k not in rest}
        return moved, extras | {TURN: {TURN: extras[TURN][TURN] + 1}}


class Adapter(NamedTuple):
    """Where one layer's W + scale B A are, by name."""

    name: str
    weight: str
    a: str
    b: str
    scale: float
    transposed: bool
    """W is stored [in, out], as GPT-2's are."""


@dataclass(frozen=True, kw_only=True)
class FedExLoRA(Strategy):
    """A and B are averaged, and mean(BA) - mean(B) mean(A) is added to W (arXiv:2410.09432).

    So no mean of products is lost (FedEx-LoRA, Singhal et al. 2024). Clients send A and B alone, which
    suffices: with A = A0 + a and B = B0 + b the difference is mean(ba) - mean(b) mean(a). But W, no more
    what clients were given, is in every later download.
    """

    needs_mean: ClassVar[str] = (
        "FedExLoRA adds to the model what the means of A and B leave out: another rule, or a code that "
        "changes them, has no such rest; take aggregator mean and no channel, or FFALoRA"
    )

    adapters: tuple[Adapter, ...] = field(default=(), repr=False)
    """Of the model; found by ``prepare``."""

    def __post_init__(self) -> None:
        """Refuse a server optimizer: what is added to W belongs to the means as they are."""
        super().__post_init__()
        no_optimizer(self, "takes the clients' means as they are", "ffalora")

    def prepare(self, model: nn.Module) -> Strategy:
        """The strategy that knows this model's layers; raises ConfigError for those without such a form."""
        _both(model, "FedExLoRA")
        return replace(self, adapters=tuple(adapters(model)))

    def arrived(self, sent: dict[str, Stack]) -> dict[str, Stack]:
        """Each client's ba beside its a and b."""
        delta = sent["delta"]
        return sent | {"products": {x.name: delta[x.b] @ delta[x.a] for x in self.adapters}}

    def step(
        self, mean: dict[str, Params], extras: dict[str, Params], share: float
    ) -> tuple[Params, dict[str, Params]]:
        """The means, and what they leave out, scaled and laid out as W is."""
        delta = mean["delta"]
        rest = {x: mean["products"][x.name] - delta[x.b] @ delta[x.a] for x in self.adapters}
        folded = {x.weight: x.scale * (r.T if x.transposed else r) for x, r in rest.items()}
        return delta | folded, extras


def strategy_for(aggregation: str, given: Strategy) -> Strategy:
    """The strategy of an aggregation by name; raises ConfigError where another is given beside it."""
    kinds: dict[str, type[Strategy]] = {"rolora": RoLoRA, "fedex": FedExLoRA}
    own = kinds.get(aggregation)
    if own is None:
        return given
    if type(given) is not FedAvg:
        raise ConfigError(
            f"lora.aggregation {aggregation} is a strategy itself, and cannot be had with "
            f"{type(given).__name__}: take lora.aggregation ffa, which goes with any"
        )
    return own(weighting=given.weighting, server=given.server, personal=given.personal)


def freeze(model: nn.Module) -> None:
    """Freeze every A of a model; raises ConfigError where there is none."""
    found = [p for n, p in model.named_parameters() if _half(n) == "A"]
    if not found:
        raise ConfigError(NONE.format("FFALoRA", type(model).__name__))
    for p in found:
        p.requires_grad_(False)


def adapters(model: nn.Module) -> list[Adapter]:
    """Every adapter whose A and B are trained; raises ConfigError for one that is no linear layer's."""
    found = []
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    for name, layer in model.named_modules():
        for key in getattr(layer, "lora_A", {}):
            a, b = (f"{name}.lora_{h}.{key}.weight" for h in "AB")
            weight: Any = getattr(layer.get_base_layer(), "weight", None)
            magnitude = key in getattr(layer, "lora_magnitude_vector", {})
            if not isinstance(weight, Tensor) or weight.dim() != 2 or magnitude:
                raise ConfigError(
                    f"FedExLoRA has no form for adapter {name} ({type(layer).__name__}), which is no plain "
                    "linear layer's: take FFALoRA or RoLoRA"
                )
            if {a, b} <= trained:
                scale = float(layer.scaling[key])
                laid = bool(getattr(layer, "fan_in_fan_out", False))
                found.append(Adapter(name, f"{name}.base_layer.weight", a, b, scale, laid))
    return found


def notes(model: nn.Module, strategy: Strategy) -> list[str]:
    """What to say of how a strategy treats adapters: that it averages A and B apart, or what it sends."""
    halves = {_half(n) for n, p in model.named_parameters() if p.requires_grad}
    if isinstance(strategy, FedExLoRA):
        sizes = [p.numel() for p in map(model.get_parameter, (x.weight for x in strategy.adapters))]
        return [
            f"FedExLoRA moves the {len(sizes)} weights under the adapters: from the second round on their "
            f"{sum(sizes):,} numbers travel down beside the adapters', and none of them up"
        ]
    if not {"A", "B"} <= halves or strategy.personal or isinstance(strategy, RoLoRA):
        return []
    return [
        f"{type(strategy).__name__} averages LoRA's A and B each by itself, and mean(B) mean(A) is not "
        "mean(BA): the more clients differ, the more it misses their mean; FFALoRA, RoLoRA and FedExLoRA "
        "do not"
    ]


NONE = (
    "{} averages LoRA adapters, and model {} trains none: make some by peft.get_peft_model, or "
    "--lora.rank 8"
)


def _half(name: str) -> str:
    kind = next((p for p in name.split(".") if p.startswith("lora_")), "")
    return kind[-1] if kind in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") else ""


def _both(model: nn.Module, who: str) -> None:
    halves = {_half(n) for n, p in model.named_parameters() if p.requires_grad}
    if not halves & {"A", "B"}:
        raise ConfigError(NONE.format(who, type(model).__name__))
    if not {"A", "B"} <= halves:
        raise ConfigError(
            f"{who} trains A and B, and one of them is frozen in this model: take FFALoRA, which needs "
            "nothing more, or unfreeze it"
        )
