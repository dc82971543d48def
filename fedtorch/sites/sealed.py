"""Encrypted sums among sites (CKKS): their keys on disk, what is in a sum, and a site's half."""

import hashlib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtorch import disk
from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.secure.encode import Figures, Layout
from fedtorch.secure.encryption import LARGEST_SUM, SLOTS, Adder, Holder, make_keys, told
from fedtorch.secure.refused import Refused
from fedtorch.secure.roster import ATTEMPT, LEAST, task_digest
from fedtorch.secure.tags import TAGS, Tags
from fedtorch.sites import letters
from fedtorch.sites.openings import Openings
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.reports import Reader
from fedtorch.sites.sums import as_vector, layout_of, together
from fedtorch.types import ConfigError, Released, Task

SECRET = b"fedtorch he secret 1\n"
"""How a secret key's file begins; then comes the digest of the public half that it belongs to."""
UNIT = 2.0**17
"""Counts ride in such units: with noise of 1e-7 and three sites, eleven million examples to the unit."""
ATTEMPTS = re.compile(rf"[0-9a-f]{{{2 * ATTEMPT}}}")
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
    data = _read(kept)
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


def read_secret(config: SiteConfig) -> tuple[bytes, bytes]:
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
    return data[at:], data[len(SECRET) : at]


@dataclass(frozen=True)
class Round:
    """What the server says of an encrypted round, beside its task."""

    asked: int
    """Sites that may be in the sum."""
    least: int
    """Sites that must be."""
    attempt: str
    """Random, in hex."""
    opener: str
    """The one site that may open the sum: two could be shown two lists."""

    @classmethod
    def read(cls, message: Message) -> "Round":
        """Of a task; raises MessageError where it does not say."""
        said = message.facts.get("he")
        said = said if isinstance(said, dict) else {}
        asked, least, opener = said.get("asked"), said.get("least"), said.get("opener")
        if type(asked) is not int or type(least) is not int:
            raise MessageError("the task does not say how many are in its sum")
        if not LEAST <= least <= asked <= letters.MOST_MEMBERS:
            raise MessageError(f"the task has a sum of {least} to {asked} sites")
        if not isinstance(opener, str) or not ATTEMPTS.fullmatch(str(said.get("attempt"))):
            raise MessageError("the task does not say which site opens its sum")
        return cls(asked, least, said["attempt"], opener)


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
        return cls(task, layout_of(reader, task), asked, not reader.recipe.privacy.per_client)

    @property
    def size(self) -> int:
        """Numbers that are told of a sum, with the riders."""
        return self.layout.values + RIDERS

    @property
    def whole(self) -> int:
        """Numbers that are encrypted, with the tags."""
        return self.size + TAGS

    @property
    def blocks(self) -> int:
        """Ciphertexts."""
        return math.ceil(self.whole / SLOTS)

    @property
    def top(self) -> float:
        """The largest number of one site's, so that no sum can wrap."""
        return LARGEST_SUM / self.asked

    def about(self, run: str, round: Round) -> dict[str, Any]:
        """What the tags of a round hang on: who was told anything else makes others."""
        facts = {"attempt": round.attempt, "opener": round.opener, "least": round.least}
        facts |= {"run": run, "task": task_digest(self.task).hex()}
        return facts | {"asked": self.asked, "size": self.size}

    def seal(self, update: Released) -> np.ndarray:
        """One site's numbers, none so large that a sum could wrap; raises Refused for NaN and infinity."""
        values, top = as_vector(self.layout, update, self.task), self.top
        if not np.isfinite(values).all():
            raise Refused("nonfinite", "its update has a number that is not finite")
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
        if not np.abs(found).max() <= LARGEST_SUM + 1 or abs(found[-RIDERS] - count) > 1e-3:
            raise MessageError(
                f"what it has opened is no sum of {count} sites: its key may be another"
            )
        return found

    def unseal(self, found: np.ndarray, ids: Sequence[str]) -> Released:
        """The update of all of ``ids`` together."""
        count, (_, examples, loss, beyond) = len(ids), found[-RIDERS:]
        clamped = round(beyond * UNIT)
        figures = Figures(count, round(examples * UNIT), loss / count, clamped)
        mean = found[:-RIDERS] / count
        return together(self.layout, mean, ids, self.task, figures, self.tells)


class Sealing:
    """This site's part in one round: it encrypts its update, and may be the one that opens the sum."""

    def __init__(
        self,
        config: SiteConfig,
        openings: Openings,
        reader: Reader,
        message: Message,
        run: str,
        task: Task,
    ) -> None:
        """Raises MessageError or ConfigError for a round that this site has no part in."""
        self.round = Round.read(message)
        if (others := self.round.least - 1) < config.least_peers:
            raise ConfigError(
                f"a sum of this round may have as few as {others} other sites, and this site's least_peers "
                f"is {config.least_peers}: let the server ask for more (--minimum), or lower least_peers"
            )
        secret, key = read_secret(config)
        if message.facts["he"].get("key") != key.hex():
            raise ConfigError(
                "this site's he.secret is not of the pair of which the server has the public half: spread "
                "the files of one fedtorch keys --he"
            )
        self.holder, self.name, self.openings = Holder(secret), config.name, openings
        self.visit: str = message.facts["visit"]
        self.run, self.task, self.done = run, task, False
        self.vector = Vector.of(reader, task, self.round.asked)
        self.tags = Tags(secret, self.vector.about(run, self.round), self.vector.top)
        self.noised = reader.recipe.privacy.per_client
        self.declined = openings.passed_on(run, task.round, self.round.opener, self.noised)
        """Why this site does not send its update; None where it does."""

    def begin(self, update: Released) -> Message:
        """This site's update, encrypted."""
        self.openings.pass_on(self.run, self.task.round, self.round.opener)
        own = self.vector.seal(update)
        whole = np.concatenate([own, self.tags.of(self.name, own)])
        return self._report("sealed", letters.blocks(self.holder.encrypt(whole)))

    def go_on(self, message: Message) -> Message:
        """The sum, opened once, and rounded; raises Refused or MessageError for any other than is due."""
        if message.facts.get("visit") != self.visit or message.facts.get("phase") != "open":
            raise MessageError(
                f"a phase of a visit that this site is not in: {short(str(message.kind))}"
            )
        if self.round.opener != self.name:
            raise MessageError(
                f"asked to open a sum that is for {short(self.round.opener)} to open"
            )
        names = self._names(message)
        try:
            code = letters.read_blocks(message, self.vector.blocks)
            found = self.holder.exact(code, self.vector.whole)
        except ConfigError as e:
            raise MessageError(str(e)) from e
        values, tags = found[:-TAGS], found[-TAGS:]
        if not self.tags.fit(names, values, tags):
            raise Refused(
                "tags",
                f"what came to be opened is not the sum of what {', '.join(names)} sent in this round: a "
                "site has another key or another model, or the server added other numbers",
            )
        if why := self.openings.refusal(self.run, self.task.round, names, self.noised):
            raise Refused("replay", why)
        self.openings.keep(self.run, self.task.round, names)
        self.done = True
        return self._report("open", {"secure": {"values": torch.from_numpy(told(values))}})

    def _names(self, message: Message) -> list[str]:
        """Whose sum it is said to be; raises Refused for too few."""
        said = message.facts.get("sites")
        if not isinstance(said, list) or not all(isinstance(n, str) for n in said):
            raise MessageError("the server does not say whose sum it is")
        count = len({*said})
        if count != len(said) or not self.round.least <= count <= self.round.asked:
            raise Refused(
                "few", f"the sum to open is of {count} sites, and {self.round.least} are due"
            )
        return said

    def _report(self, phase: str, groups: dict[str, dict[str, Tensor]]) -> Message:
        facts = {"run": self.run, "visit": self.visit, "round": self.task.round, "phase": phase}
        return Message("report", facts, groups)


def _read(path: Path) -> bytes:
    try:
        return disk.regular(path).read_bytes()
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
