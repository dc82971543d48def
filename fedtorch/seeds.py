"""Randomness is an argument: every draw comes from (seed, round, client, purpose).

Nothing depends on how many draws happened before, so a resumed run, another chunk size or another
engine draws the same numbers. Purposes that come from a run's seed: ``cohort`` (who is chosen), ``order``
(a client's shuffles), ``visit`` (dropout, augmentation), ``dropout`` (who drops out), ``strategy``, and
of a simulated clock ``next`` (who is asked), ``speed`` and ``seconds``.
Noise and everything else that must stay secret never does: see ``fedtorch.privacy.noise``.
"""

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch

ONE = threading.RLock()
"""Held by the thread that draws from the global generators."""

if hasattr(os, "register_at_fork"):  # a copy of the process has no thread that would let it go
    os.register_at_fork(after_in_child=ONE._at_fork_reinit)  # type: ignore[attr-defined]


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose; stable across processes and Python versions."""
    digest = hashlib.blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A torch generator for one purpose."""
    return torch.Generator().manual_seed(derive(seed, *purpose))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python, and put them back afterwards.

    Dropout and a user's augmentation draw from these; seeding them for each visit is what makes
    a resumed run repeat the same masks and crops.
    """
    with kept():
        set_global(seed)
        yield


class Later(Sequence[int]):
    """Seeds that are derived when somebody first looks at one: few strategies draw from them."""

    def __init__(self, make: Callable[[], tuple[int, ...]], size: int) -> None:
        """``size``: how many it makes."""
        self.make, self.size = make, size

    @cached_property
    def made(self) -> tuple[int, ...]:
        """All of them."""
        return self.make()

    def __len__(self) -> int:
        """How many there are."""
        return self.size

    def __getitem__(self, k: Any) -> Any:
        """One, or a tuple of some."""
        return self.made[k]


class Draws:
    """The global generators as one party has them, call after call; all others go on as they were."""

    def __init__(self, *purpose: str | int) -> None:
        """``purpose``: seeds and words, as of ``derive``."""
        self._purpose, self._left = purpose, list[Any]()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """From where they were last left in here."""
        with kept():
            set_global(derive(0, *self._purpose))
            for (_, put), left in zip(_generators(), self._left, strict=False):
                put(left)
            yield
            self._left = [take() for take, _ in _generators()]


def _generators() -> list[tuple[Callable[[], Any], Callable[[Any], object]]]:
    """How the state of each is taken and put back."""
    cuda = (torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    return [
        (random.getstate, random.setstate),
        (np.random.get_state, np.random.set_state),
        (torch.get_rng_state, torch.set_rng_state),
        *([cuda] if torch.cuda.is_initialized() else []),
    ]


@contextmanager
def kept() -> Iterator[None]:
    """Put the global generators of torch, NumPy and Python back afterwards.

    One thread at a time is in here: two runs in two threads would draw each other's numbers.
    """
    with ONE:
        state = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(None if torch.cuda.is_initialized() else []):
            try:
                yield
            finally:
                random.setstate(state[0])
                np.random.set_state(state[1])


def set_global(seed: int) -> None:
    """Seed the global generators; inside ``kept()``, which costs ten times as much."""
    # torch.manual_seed also queues a seed, with a stack trace, for every accelerator that is not in
    # use: half a millisecond a visit and a list that never shrinks
    accelerator = torch.cuda.is_initialized()
    (torch.manual_seed if accelerator else torch.default_generator.manual_seed)(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
