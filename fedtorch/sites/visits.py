"""The visits of one round, and what becomes of each when the round is over."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fedtorch.privacy import Privacy
from fedtorch.types import ConfigError, Failure, Released, Task


@dataclass(eq=False)
class Visit:
    """One site's part in one round."""

    site: str
    task: Task
    nonce: str = field(default_factory=lambda: secrets.token_hex(16))
    asked: float = field(default_factory=time.monotonic)
    taken: bool = False
    outcome: Released | Failure | None = None
    place: int = 0
    """Reports of the round that were there when this one came, itself included."""
    sent: int = 0
    received: int = 0
    seconds: float = 0.0

    @property
    def updated(self) -> bool:
        """Whether it brought an update."""
        return isinstance(self.outcome, Released)


def judge(visits: Sequence[Visit], most: int, least: int, deadline: float) -> Sequence[Visit]:
    """Give every visit of a round that is over its outcome; the order stays.

    Of the updates the ``most`` that came first count, and none when there are fewer than ``least``.
    """
    first = sorted((v for v in visits if v.updated), key=lambda v: v.place)[:most]
    for visit in visits:
        if visit.outcome is None or (visit.updated and visit not in first):
            kind = "late" if visit.taken else "absent"
            full = len(first) == most
            why = f"{most} others had reported" if full else f"no report in {deadline:g} s"
            visit.outcome = Failure(visit.site, kind, why)
        elif visit.updated and len(first) < least:
            few = f"only {len(first)} sites reported"
            visit.outcome = Failure(visit.site, "toofew", few)
    return visits


def check_enough(enough: int, minimum: int, sites: int, privacy: Privacy) -> None:
    """Refuse over-selection where it would void what a privacy plan promises, and numbers without sense."""
    if not minimum <= enough <= sites:
        raise ConfigError(
            f"enough must be between minimum ({minimum}) and the {sites} sites, got {enough}"
        )
    if privacy.central:
        raise ConfigError(
            "enough voids the claim of client-level privacy: were one client not there, a slower one "
            "would take its place, and the sum would change by twice the clipping norm; leave it out"
        )
    if privacy.strict:
        raise ConfigError(
            "privacy.strict keeps from everybody how long sites take, but with enough the model "
            "depends on who was first; leave one of them out"
        )
