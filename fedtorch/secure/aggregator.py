"""The aggregator ``secure``: the server learns what the mean needs, and no client's own update.

Over sites the sum is opened by the protocol. In a simulation nobody has to be kept from anything, so the
same whole numbers are added without masks, which would cancel to the bit.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedtorch.aggregation.mean import Held, RunningMean
from fedtorch.options import COUNT, POSITIVE, Range, brief, check
from fedtorch.privacy import Privacy
from fedtorch.secure import costs
from fedtorch.secure.encode import RIDERS, Coding
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import LEAST, Member, Terms, default_threshold
from fedtorch.secure.whole import WholeSum
from fedtorch.types import ConfigError, Params, Released

NEIGHBOURS = Range("at least 2", 2, float("inf"), "high")


@dataclass(frozen=True, kw_only=True)
class Secure:
    """The mean of what clients send under masks that cancel in the sum (Bonawitz et al., CCS 2017).

    Fewer than ``threshold`` of those asked, and the round is lost: the model stays as it was. What masks
    hide is whose update it is; what all of them together say of somebody's data they do not hide.
    """

    __repr__ = brief

    linear: ClassVar[bool] = True
    hides: ClassVar[bool] = True

    threshold: int | None = None
    """Clients that must report, and that must collude with the server to see an update; none: two thirds
    of those asked, and one."""
    width: int = 64
    """Bits of a number: 64, or 32, which halves the bytes and needs a range."""
    range: float | None = None
    """Largest number of an update; what is larger is clamped, and counted. None: 32,768 at width 64, and
    the clipping norm at width 32 under client-level privacy."""
    neighbours: int | None = None
    """With how many others each client shares masks, above about 100 clients (Bell et al. 2020): an even
    number. None: with all of them."""
    weight_cap: int | None = None
    """Weigh clients by their examples, up to this public number; none: all alike."""
    phase_seconds: float = 30.0
    """How long sites have for each of the exchanges after training."""

    def __post_init__(self) -> None:
        """Refuse what is no number of clients, bits or seconds."""
        check(
            self,
            "aggregator",
            threshold=COUNT,
            range=POSITIVE,
            neighbours=NEIGHBOURS,
            weight_cap=COUNT,
            phase_seconds=POSITIVE,
        )
        if self.width not in (32, 64):
            raise ConfigError(f"aggregator.width must be 64 or 32, got {self.width}")
        if self.neighbours is not None and self.neighbours % 2:
            raise ConfigError(f"aggregator.neighbours must be even, got {self.neighbours}")

    @property
    def apart(self) -> bool:
        """Whether a simulation needs each client's own update: at width 64 a sum is as good, to 2^-40."""
        return self.width == 32

    def near(self, clients: int) -> int:
        """With how many others each of so many shares masks."""
        return min(clients - 1, self.neighbours or clients)

    def needed(self, clients: int) -> int:
        """How many of those who hold shares of one client's secrets open them."""
        return self.threshold or default_threshold(self.near(clients) + 1)

    def fewest(self, clients: int) -> int:
        """How many of so many must report for their sum to be opened."""
        return max(LEAST, self.needed(clients) if clients else 0)

    def coding(self, clients: int, privacy: Privacy) -> Coding:
        """The fixed point of a round of so many; raises ConfigError where there is none."""
        try:
            if grid := privacy.grid(clients):
                return Coding(self.width, clients, *grid)
            return Coding.of(self.width, clients, self.range or _bound(self.width, privacy))
        except Refused as e:
            raise ConfigError(f"aggregator secure: {e}: take width 64 or a smaller range") from e

    def terms(
        self,
        *,
        run: str,
        round: int,
        attempt: bytes,
        task: bytes,
        members: tuple[Member, ...],
        size: int,
        privacy: Privacy,
    ) -> Terms:
        """What every party of an attempt must hold alike; raises ConfigError where there is no coding."""
        coding = self.coding(len(members), privacy)
        return Terms(
            run=run,
            round=round,
            attempt=attempt,
            task=task,
            members=members,
            threshold=self.needed(len(members)),
            width=coding.width,
            range=coding.range,
            scale=coding.scale,
            size=size,
            neighbours=self.neighbours,
        )

    def check(self, most: int, privacy: Privacy) -> None:
        """Raises ConfigError where a round, of ``most`` clients, can never be opened."""
        if most < LEAST:
            raise ConfigError(
                f"aggregator secure needs {LEAST} clients a round, and there are {most}: of two each would "
                "know the other's update; let more clients take part"
            )
        holders = self.near(most) + 1
        least = holders // 2 + 1
        if not least <= self.needed(most) <= holders:
            raise ConfigError(
                f"aggregator.threshold must be from {least} to {holders} (more than half of those who hold "
                f"shares), got {self.threshold}: leave it out for {default_threshold(holders)}"
            )
        self.coding(most, privacy)

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> "SecureSum":
        """Nobody yet; ``SecureSum.expect`` says who is asked."""
        return SecureSum(self)


def _bound(width: int, privacy: Privacy) -> float | None:
    """What the plan says of the largest number of an update."""
    if width == 64:
        return None
    if privacy.central and getattr(privacy, "adaptive", None) is None:
        return privacy.clip
    raise ConfigError(
        "aggregator.width 32 needs a range, the largest number of an update, which is to be the same for "
        "all: give aggregator.range, or take width 64"
    )


class SecureSum:
    """What is opened of one round."""

    def __init__(self, rule: Secure) -> None:
        """Nothing added yet."""
        self.held, self.figures = Held(), dict[str, Any]()
        self._rule = rule
        self._asked = self._fewest = 0
        self._reported = 0
        self._mean = RunningMean()
        self._whole: WholeSum | None = None

    def expect(self, asked: int, privacy: Privacy, clip: float) -> None:
        """So many clients are asked; ``clip``: the clipping norm of this round."""
        self._asked, self._fewest = asked, privacy.fewest
        if self._rule.apart and asked:
            coding = self._rule.coding(asked, privacy)
            cap, norm = self._rule.weight_cap, clip if privacy.central else None
            self._whole = WholeSum(coding, cap, norm)

    def add(self, update: Released) -> None:
        """Add clients of a simulation, or the mean that sites' masked vectors came to."""
        self._reported += len(update.ids)
        if self._whole is not None and not (update.summed and len(update.ids) > 1):
            self._whole.add(update)
        else:
            self._mean.add(update)
            if "clamped" in update.metrics:
                self._clamped(int(update.metrics["clamped"].sum().round()))

    def short(self) -> bool:
        """Whether too few have reported for anything to be opened."""
        needed = max(self._rule.fewest(self._asked), self._fewest)
        if self._reported < needed:
            self.figures["too_few"] = (
                f"aggregator secure opens the sum of {needed} or more of {self._asked} clients, and "
                f"{self._reported} reported"
            )
        return self._reported < needed

    def sums(self) -> dict[str, Params]:
        """Weighted sum of each sent group, for noise that is made for a sum."""
        return self._whole.sums() if self._whole and self._whole.came else self._mean.sums()

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """The mean of each sent group and of the float buffers; nothing where too few reported."""
        if self.short():
            return {}, {}
        if self._whole and self._whole.came:
            sent, buffers, clamped = self._whole.result(start)
            self._clamped(clamped)
        else:
            sent, buffers = self._mean.result(start)
        numbers = sum(v.numel() for g in (*sent.values(), buffers) for v in g.values())
        self._count(numbers + len(RIDERS))
        return sent, buffers

    def _clamped(self, count: int) -> None:
        if count:
            self.figures["clamped"] = count

    def _count(self, size: int) -> None:
        rule, asked, here = self._rule, self._asked or self._reported, self._reported
        cost = costs.cost_of(asked, here, rule.near(asked), rule.needed(asked), size, rule.width)
        self.figures |= {
            "bytes_up": here * cost.up,
            "secure_bytes_down": here * cost.down,
            "secure_client_seconds": cost.client,
            "secure_server_seconds": cost.server,
        }
