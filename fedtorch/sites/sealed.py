"""Encrypted sums among sites (CKKS): their keys on disk, what is in a sum, and a site's half."""

import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.secure.encode import Layout
from fedtorch.secure.encryption import MOST, SLOTS, Adder, Holder, make_keys
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import LEAST
from fedtorch.sites import letters
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.reports import Reader
from fedtorch.sites.sums import layout
from fedtorch.tree import expand, row
from fedtorch.types import ConfigError, Released, Task

SECRET = b"fedtorch he secret 1\n"
"""How a secret key's file begins; then comes the digest of the public half that it belongs to."""
UNIT = 2.0**17
"""Counts ride in such units: with noise of 1e-7 and three sites, eleven million examples to the unit."""
RIDERS = 4
"""Numbers beside the update: sites in the sum, their examples, their losses, how many were clamped."""


def make(folder: Path, sites: Sequence[str]) -> list[Path]:
    """Write he.secret for each site and he.public for the server; returns the files that are new.

    The key that lies with the authority is used again, so that sites can be added later.
    """
    kept, made = folder / "ca/he.secret", []
    public = folder / "server/he.public"
    if not kept.exists():
        secret, half = make_keys()
        _write(kept, SECRET + hashlib.sha256(half).digest() + secret, 0o600)
        _write(public, half, 0o644)
        made.append(public)
    data = kept.read_bytes()
    for name in sites:
        own = folder / name / "he.secret"
        if not own.exists():
            _write(own, data, 0o600)
            made.append(own)
    return made


def read_public(path: Path | None) -> tuple[Adder, bytes]:
    """A server's key and its digest; raises ConfigError for none, and for a secret one."""
    if path is None:
        raise ConfigError(
            "aggregator he among sites needs the public key: --he-public FILE (fedtorch keys --he makes it)"
        )
    data = _read(path)
    if data.startswith(SECRET):
        raise ConfigError(
            f"{path} is the secret key of the sites, which a server must never have: give it he.public"
        )
    return Adder(data), hashlib.sha256(data).digest()


def read_secret(config: SiteConfig) -> tuple[Holder, bytes]:
    """A site's key and the digest of its public half; raises ConfigError for none."""
    path = config.he_secret
    if not path and config.credentials and (own := Path(config.credentials, "he.secret")).exists():
        path = str(own)
    if not path:
        raise ConfigError(
            "the run's sums are encrypted (aggregator he), and this site has no key: --he-secret FILE "
            "(fedtorch keys --he makes it)"
        )
    data = _read(Path(path))
    if not data.startswith(SECRET):
        raise ConfigError(
            f"{path} is no secret key of fedtorch keys --he: give a site its he.secret"
        )
    at = len(SECRET) + 32
    return Holder(data[at:]), data[len(SECRET) : at]


@dataclass(frozen=True)
class Vector:
    """What stands in a sum of one round: the same for the server and for every site."""

    task: Task
    """With what never changes filled in."""
    layout: Layout
    asked: int
    tells: bool
    """Whether examples and losses ride along: where each site's own noise counts, they do not."""

    @classmethod
    def of(cls, reader: Reader, task: Task, asked: int) -> "Vector":
        """Of a round of so many."""
        return cls(task, layout(reader, task), asked, not reader.recipe.privacy.per_client)

    @property
    def size(self) -> int:
        """Numbers, with the riders."""
        return self.layout.values + RIDERS

    @property
    def blocks(self) -> int:
        """Ciphertexts."""
        return math.ceil(self.size / SLOTS)

    def seal(self, update: Released) -> np.ndarray:
        """One site's numbers, none so large that a sum could wrap."""
        own = {g: row(s, 0) for g, s in update.sent.items()}
        changes = {
            k: v[0].double() - self.task.state[k].double() for k, v in update.buffers.items()
        }
        values, top = self.layout.flat(own, changes), MOST / self.asked
        examples = loss = 0.0
        if self.tells:
            examples = float(update.metrics["examples"]) / UNIT
            loss = float(update.metrics["train_loss"])
            loss = loss if math.isfinite(loss) else 2 * top
        beyond = int((np.abs(values) > top).sum()) + (examples > top) + (abs(loss) > top)
        found = np.array([*values, 1.0, examples, loss, beyond / UNIT])
        return found.clip(-top, top)

    def checked(self, values: Tensor, count: int) -> np.ndarray:
        """What a site has opened, if so many sites can have such a sum; raises MessageError."""
        if values.dtype != torch.float64 or values.shape != (self.size,):
            raise MessageError("what it has opened is of another size than the sum")
        found = values.numpy()
        if not np.abs(found).max() <= MOST + 1 or abs(found[-RIDERS] - count) > 1e-3:
            raise MessageError(
                f"what it has opened is no sum of {count} sites: its key may be another"
            )
        return found

    def unseal(self, found: np.ndarray, ids: Sequence[str]) -> Released:
        """The update of all of ``ids`` together."""
        count = len(ids)
        sent, changes = self.layout.unflat(found[:-RIDERS] / count)
        _, examples, loss, beyond = found[-RIDERS:]
        each = torch.full((count,), 1 / count, dtype=torch.float64)
        told = {"examples": each * round(examples * UNIT), "train_loss": each * loss}
        return Released.received(
            ids=tuple(ids),
            sent={g: expand(s) for g, s in sent.items()},
            buffers=expand({k: self.task.state[k].double() + v for k, v in changes.items()}),
            weight=torch.ones(count, dtype=torch.float64),
            metrics={"clamped": each * round(beyond * UNIT)} | (told if self.tells else {}),
            summed=True,
        )


class Sealing:
    """This site's part in one round: it encrypts its update, and may be the one that opens the sum."""

    def __init__(
        self, config: SiteConfig, reader: Reader, message: Message, run: str, task: Task
    ) -> None:
        """Raises MessageError or ConfigError for a round that this site has no part in."""
        said = message.facts.get("he")
        asked = said.get("asked") if isinstance(said, dict) else None
        if (
            not isinstance(said, dict)
            or type(asked) is not int
            or not asked <= letters.MOST_MEMBERS
        ):
            raise MessageError("the task does not say how many are in its sum")
        self.least = max(LEAST, config.least_peers + 1)
        if asked < self.least:
            raise ConfigError(
                f"the sum of this round has {asked - 1} other sites, and this site's least_peers is "
                f"{config.least_peers}"
            )
        self.holder, key = read_secret(config)
        if said.get("key") != key.hex():
            raise ConfigError(
                "this site's he.secret is not of the pair of which the server has the public half: spread "
                "the files of one fedtorch keys --he"
            )
        self.visit: str = message.facts["visit"]
        self.run, self.task, self.done = run, task, False
        self.vector = Vector.of(reader, task, asked)

    def begin(self, update: Released) -> Message:
        """This site's update, encrypted."""
        return self._report("sealed", letters.blocks(self.holder.encrypt(self.vector.seal(update))))

    def go_on(self, message: Message) -> Message:
        """The sum, opened once, and rounded; raises Refused for that of too few."""
        if message.facts.get("visit") != self.visit or message.facts.get("phase") != "open":
            raise MessageError(
                f"a phase of a visit that this site is not in: {short(str(message.kind))}"
            )
        found = self.holder.opened(letters.read_blocks(message, self.vector.blocks))
        self.done = True
        count = float(found[-RIDERS]) if len(found) == self.vector.size else 0.0
        if abs(count - round(count)) > 1e-3 or not self.least <= round(count) <= self.vector.asked:
            raise Refused(
                "few", f"the sum to open is of {count:.3g} sites, and {self.least} are due"
            )
        return self._report("open", {"secure": {"values": torch.from_numpy(found)}})

    def _report(self, phase: str, groups: dict[str, dict[str, Tensor]]) -> Message:
        facts = {"run": self.run, "visit": self.visit, "round": self.task.round, "phase": phase}
        return Message("report", facts, groups)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ConfigError(f"the key {path} cannot be read: {e.strerror}") from e


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # made readable for its owner alone before anything is in it
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
    except OSError as e:
        raise ConfigError(f"keys cannot be written to {path.parent}: {e.strerror}") from e
