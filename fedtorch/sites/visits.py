"""Which visits a server's message speaks of, and a site's words about a visit and what it costs."""

import re
from typing import NamedTuple

from fedtorch.engines.messages import Outcome
from fedtorch.engines.wire import Message, MessageError, short
from fedtorch.run.versions import installed
from fedtorch.sites.joined import NOBODY
from fedtorch.sites.offer import Plan
from fedtorch.types import Failure

VISIT = re.compile(r"[0-9a-f]{32}")


class Named(NamedTuple):
    """The visits that a task names."""

    visit: str
    """The one that it asks for."""
    after: str
    """The last one of this site's; empty: there was none."""
    saved: str
    """The last that a checkpoint of the server's knows; empty: none."""


def asked_for(message: Message, why: str = "the task names no visit") -> str:
    """The visit that a message asks for; raises MessageError, saying ``why``, where it names none."""
    visit = message.facts.get("visit")
    if not (isinstance(visit, str) and VISIT.fullmatch(visit)):
        raise MessageError(why)
    return visit


def visits_of_task(message: Message) -> Named:
    """All visits that a task names; raises MessageError where it does not say them."""
    visit = asked_for(message)
    after = _or_none(message.facts.get("after"), "which visit was the last")
    return Named(
        visit, after, _or_none(message.facts.get("saved", ""), "which visit a checkpoint knows")
    )


def _or_none(visit: object, what: str) -> str:
    if not (isinstance(visit, str) and (not visit or VISIT.fullmatch(visit))):
        raise MessageError(f"the task does not say {what}")
    return visit


def kept_as(plan: Plan, visit: str) -> str:
    """What the memory after a visit is kept as.

    What another plan left unnoised, as weights that are this site's own, must not come into this run.
    """
    return f"{plan.run} {visit}" if visit else ""


def not_done(site: str, kind: str = "budget", why: str = "its privacy budget is spent") -> Outcome:
    """What a site sends in place of a visit."""
    return Outcome(NOBODY, [Failure(site, kind, why)], {})


def other_version(theirs: object) -> str:
    """That the server runs another version of fedtorch, in words; nothing where it does not say so."""
    ours = installed("fedtorch")
    if not isinstance(theirs, str) or theirs == ours:
        return ""
    return f"the server runs fedtorch {short(theirs)}, and this site {ours}"


def promise(plan: Plan) -> str:
    """What a run's privacy costs by its plan, in words: who sets no max_epsilon should read it."""
    privacy = plan.privacy
    if privacy is None or privacy.rounds is None:
        return "no privacy"
    cost = privacy.planned(privacy.calibrated(privacy.rounds), privacy.rounds)
    adds = "added here" if privacy.per_client else "that the server says it adds"
    if privacy.masked:
        adds = "of which each site adds a share, " + privacy.describe()["trusted"].partition(";")[0]
    return f"epsilon {cost:.3g} at delta {privacy.delta:g} for each {privacy.unit}, by noise {adds}"
