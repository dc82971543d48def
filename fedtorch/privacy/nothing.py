"""No privacy: everything leaves as it is, and nobody is promised anything."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from fedtorch.privacy.accounting.events import Event
from fedtorch.privacy.base import Privacy
from fedtorch.types import ConfigError, Params, Task


@dataclass(frozen=True, init=False)
class Nothing(Privacy):
    """The plan of a run without privacy, so that nobody has to ask whether there is one.

    Guarantee: none.
    """

    unit: ClassVar[Literal["example", "client", "nobody"]] = "nobody"
    per_client: ClassVar[bool] = False
    claims: ClassVar[bool] = False
    statistics: ClassVar[bool] = True
    weighting: ClassVar[Literal["examples", "uniform"]] = "examples"

    def __init__(self) -> None:
        """There is nothing to choose."""

    def __repr__(self) -> str:
        """Without the options, of which none means anything here."""
        return "Nothing()"

    def planned_for(self, rounds: int) -> "Nothing":
        """The same for any number."""
        return self

    def event(self, noise: float) -> Event:
        """There is no such event; raises TypeError."""
        raise TypeError("a run without privacy releases everything: no event stands for that")

    def check(self, population: int, noise: float) -> list[str]:
        """There is no claim to void."""
        return []

    def check_numbers(self, numbers: Mapping[str, float]) -> None:
        """There are none."""

    def disclosed(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """All of them."""
        return figures

    def describe(self) -> dict[str, str]:
        """In words."""
        return {"unit": "nobody", "mechanism": "no noise"}


class OpenRun:
    """What ``PrivateRun`` is for a plan, of a run without one: nothing is charged, noised or held back."""

    plan = Nothing()

    def check(self) -> list[str]:
        """Nothing to say."""
        return []

    def affordable(self, asked: Sequence[Sequence[int]], round: int) -> bool:
        """There is no budget."""
        return True

    def charge(self, cohort: Sequence[int], round: int) -> None:
        """Nobody keeps an account."""

    def numbers(self, round: int) -> dict[str, float]:
        """Clients need none."""
        return {}

    def release(self, sums: Callable[[], dict[str, Params]]) -> None:
        """An ordinary mean will do."""

    def mark(self, figures: dict[str, Any]) -> dict[str, Any]:
        """As they are."""
        return figures

    def told(
        self, means: dict[str, Params], task: Task, reported: int, scored: bool
    ) -> dict[str, float]:
        """None: whatever is told is told as it is."""
        return {}

    def figures(self) -> dict[str, float]:
        """There are none."""
        return {}

    def state_dict(self) -> None:
        """Nothing to go on from."""

    def load_state_dict(self, saved: dict[str, Any] | None, ledger: object = None) -> None:
        """Raises ConfigError where the checkpoint is of a private run."""
        if saved is not None:
            raise ConfigError(DISAGREE)


DISAGREE = "the checkpoint and this run do not agree on whether training is private"
