"""The aggregator ``he``: the server adds what it cannot read, and a client opens the sum.

In a simulation the encryption is the real one, of every client in every round: for small models.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from fedtorch.aggregation.mean import Held, RunningMean
from fedtorch.options import POSITIVE, brief, check
from fedtorch.privacy import Privacy
from fedtorch.secure.encode import Layout
from fedtorch.secure.encryption import LARGEST_SUM, Adder, Holder, make_keys, tenseal
from fedtorch.secure.roster import LEAST
from fedtorch.types import ConfigError, Params, Released


@dataclass(frozen=True, kw_only=True)
class HE:
    """The mean of what clients send encrypted, by a key of theirs: CKKS (Cheon et al., ASIACRYPT 2017).

    All of them share the key, and the server has it not. One client that works with the server opens every
    update, where ``Secure`` needs as many as its threshold; it costs 3 MB for 100,000 numbers. It is for
    few clients who trust each other, and a server that hears from each of them once a round. Numbers larger
    than 256 over the clients of a round are clamped, and counted. What is opened has noise of 1e-7 and is
    rounded, so that it does not give the key away; a run is therefore not repeatable to the last bit.
    """

    __repr__ = brief

    linear: ClassVar[bool] = True
    hides: ClassVar[bool] = True

    phase_seconds: float = 30.0
    """How long a site has to open the sum, else the round is lost; in a simulation it does nothing."""

    def __post_init__(self) -> None:
        """Refuse what is no number of seconds."""
        check(self, "aggregator", phase_seconds=POSITIVE)

    def check(self, most: int, privacy: Privacy) -> None:
        """Raises ConfigError where a sum shows one, or without TenSEAL."""
        if most < LEAST:
            raise ConfigError(
                f"aggregator he needs {LEAST} clients a round, and there are {most}: of two each would "
                "know the other's update; let more clients take part"
            )
        tenseal()

    def start(
        self, held: Held | None = None, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> "EncryptedSum":
        """Nobody yet; ``EncryptedSum.expect`` says how many are asked."""
        return EncryptedSum()


@lru_cache(maxsize=1)
def _keys() -> tuple[bytes, bytes]:
    return make_keys()


class EncryptedSum:
    """One round: ciphertexts are added as they come, and one client opens the sum."""

    def __init__(self) -> None:
        """Nothing added yet."""
        self.held, self.figures = Held(), dict[str, Any]()
        self._mean: RunningMean | None = None
        """Of sites, one of which has opened the sum: here is no key."""
        self._parties: tuple[Holder, Adder] | None = None
        self._layout: Layout | None = None
        self._sum: list[bytes] = []
        self._came, self._clamped, self._bytes, self._seconds = 0, 0, 0, 0.0
        self._range = LARGEST_SUM

    def expect(self, asked: int, privacy: Privacy, clip: float) -> None:
        """So many clients are asked: a number of each may be so large that their sum fits."""
        self._range = LARGEST_SUM / max(asked, 1)

    def short(self) -> bool:
        """Whether too few have reported for the sum to be opened."""
        if few := self._came < LEAST:
            self.figures["too_few"] = (
                f"aggregator he opens the sum of {LEAST} clients or more, and {self._came} reported"
            )
        return few

    def add(self, update: Released) -> None:
        """Each client of a chunk: encrypted with the key, added without it."""
        if update.summed:
            self._mean = self._mean or RunningMean()
            self._mean.add(update)
            self._came += len(update.ids)
            self._clamped += int(update.metrics["clamped"].sum().round())
            return
        secret, public = _keys()
        client, server = self._parties = self._parties or (Holder(secret), Adder(public))
        start = time.process_time()
        for k in range(len(update.ids)):
            own = {g: {n: v[k] for n, v in s.items()} for g, s in update.sent.items()}
            own["buffers"] = {n: v[k].double() for n, v in update.buffers.items()}
            shapes = {g: {n: tuple(v.shape) for n, v in s.items()} for g, s in own.items()}
            self._layout = self._layout or Layout.of(shapes, {})
            values = self._layout.flat(own, {})
            self._clamped += int((np.abs(values) > self._range).sum())
            code = client.encrypt(values.clip(-self._range, self._range))
            self._bytes += sum(map(len, code))
            self._sum = server.add([self._sum, code]) if self._sum else code
            self._came += 1
        self._seconds += time.process_time() - start

    def sums(self) -> dict[str, Params]:
        """Sum of each sent group, opened."""
        assert self._layout is not None and self._parties is not None
        start = time.process_time()
        found, _ = self._layout.unflat(self._parties[0].opened(self._sum, self._layout.values))
        self._seconds += time.process_time() - start
        return found

    def result(self, start: Params) -> tuple[dict[str, Params], Params]:
        """The mean of each sent group and of the float buffers; nothing where too few reported."""
        if self.short():
            return {}, {}
        if self._mean is not None:
            if self._clamped:
                self.figures["clamped"] = self._clamped
            return self._mean.result(start)
        means = {g: {n: v / self._came for n, v in s.items()} for g, s in self.sums().items()}
        self.figures |= {"bytes_up": self._bytes, "he_seconds": self._seconds}
        if self._clamped:
            self.figures["clamped"] = self._clamped
        return means, means.pop("buffers", {})
