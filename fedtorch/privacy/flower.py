"""A mod for Flower's apps: what a node trained leaves clipped, noised and charged, or it does not leave.

Flower's mods arrive with the job, so this one binds apps that the site has read and trusts
(``docs/inside-flower.md``). Its budget is the node's own: a job cannot change it.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode

from fedtorch.privacy.alone import Budget
from fedtorch.privacy.answers import answer
from fedtorch.privacy.local import LocalDP
from fedtorch.types import ConfigError, OverBudget

PREFIX = "privacy."
"""Of what concerns the mod in a node's config, which a file writes as a table ``[privacy]``."""

PLAN = {
    "epsilon": float,
    "delta": float,
    "rounds": int,
    "clip": float,
    "noise_multiplier": float,
    "mechanism": str,
}
"""Options of ``LocalDP``."""

OPTIONS = {"site": str, "folder": str, "most": float} | PLAN
"""Beside them whose ledger it is, its absolute folder, and the ``most`` of a ``Budget``."""

WEIGHT = "num-examples"
"""What Flower's strategies weigh a reply by: 1 here, as a site's number of examples is private."""

SILENT = (
    "nothing leaves this node: what its app answered cannot be released, the node's log says why"
)

UNFIT = "nothing leaves this node: its own config or ledger is no budget, the node's log says why"

LOG = logging.getLogger("flwr")


class Next(Protocol):
    """The app, or the mod before it."""

    def __call__(self, message: Message, context: Context, /) -> Message:
        """Its reply."""


def private_release(msg: Message, context: Context, call_next: Next) -> Message:
    """Clip and noise a node's weights, and charge them to the node's own ledger before they leave.

    For ``ClientApp(mods=[private_release])``, first in the list. Of the reply to a ``train`` message the
    weights leave, about those that the server sent; with them goes ``num-examples``, which is 1. Metrics,
    configs and replies to other messages (``evaluate``, ``query``) do not leave, nor does what cannot be
    read, nor the text of an app's error. A spent budget is an error that says so by the site's name.

    The plan and its limit are in the node's own config (``budget_of``), never in the run's.

    Guarantee: that of ``LocalDP``, for all that passes the mod, over all runs and restarts.
    """
    try:
        budget = budget_of(context.node_config)
    except Exception as e:  # which may name the node's own folders, as the system's errors do
        return _refused(msg, ErrorCode.MOD_FAILED_PRECONDITION, UNFIT, e)
    try:
        name, sent = _asked(msg)
    except ConfigError as e:
        return _refused(msg, ErrorCode.MOD_FAILED_PRECONDITION, str(e), e)
    round = _round(msg)
    try:
        reply = call_next(msg, context)
        if reply.has_error():
            raise ConfigError(f"the app failed: {reply.error.reason}")
        released = answer(_weights(reply, "the reply")[1], sent, budget, round)
    except OverBudget as e:
        return _refused(msg, ErrorCode.MOD_FAILED_PRECONDITION, str(e), e)
    except Exception as e:  # whatever it says may be of the data
        return _refused(msg, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, SILENT, e)
    LOG.info("%s released at epsilon %.4f of %g", budget.site, budget.spent, budget.most)
    weights = ArrayRecord({k: Array(v.numpy()) for k, v in released.items()})
    return Message(RecordDict({name: weights, "metrics": MetricRecord({WEIGHT: 1})}), reply_to=msg)


def budget_of(config: Mapping[str, Any]) -> Budget:
    """The budget of a node's config, whose keys are ``privacy.site``, ``privacy.folder`` and others.

    In a file for ``flower-supernode --node-config FILE.toml`` they are a table ``[privacy]``. Raises
    ConfigError where they are missing, unknown or no budget.
    """
    given = {k.removeprefix(PREFIX): v for k, v in config.items() if k.startswith(PREFIX)}
    for name, value in given.items():
        if name not in OPTIONS:
            raise ConfigError(
                f"this node's config has {PREFIX}{name}; known are {', '.join(OPTIONS)}"
            )
        kinds = (float, int) if OPTIONS[name] is float else OPTIONS[name]
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ConfigError(
                f"this node's config has {PREFIX}{name} = {value!r}, not of type {OPTIONS[name].__name__}"
            )
    for name in ("site", "folder"):
        if not given.get(name):
            raise ConfigError(
                f"this node's config has no {PREFIX}{name}: start flower-supernode with --node-config "
                "FILE.toml, and in the file a table [privacy] with site, folder, epsilon and rounds"
            )
    folder = Path(given["folder"])
    if not folder.is_absolute():
        raise ConfigError(
            f"{PREFIX}folder {folder} must be an absolute path: apps run in other folders"
        )
    plan = LocalDP(**{k: v for k, v in given.items() if k in PLAN})
    return Budget(folder, plan, site=given["site"], most=given.get("most"))


def _asked(msg: Message) -> tuple[str, dict[str, np.ndarray]]:
    """The weights that the server sent, read before an app can change them."""
    kind = msg.metadata.message_type
    if kind.split(".")[0] != MessageType.TRAIN:
        raise ConfigError(
            f"this node answers train messages alone: no noise covers a reply to {kind}"
        )
    return _weights(msg, "the message")


def _weights(msg: Message, what: str) -> tuple[str, dict[str, np.ndarray]]:
    records = msg.content.array_records
    if len(records) != 1:
        raise ConfigError(f"{what} has {len(records)} records of arrays, and one can be released")
    [(name, record)] = records.items()
    try:
        return name, {k: v.numpy() for k, v in record.items()}
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{what} has an array that cannot be read: {e}") from e


def _round(msg: Message) -> int:
    """As the server says; for the ledger's lines alone."""
    found = [c.get("server-round") for c in msg.content.config_records.values()]
    return next((r for r in found if isinstance(r, int)), 0)


def _refused(msg: Message, code: int, told: str, why: Exception) -> Message:
    LOG.error("nothing leaves this node: %s: %s", type(why).__name__, why)
    return Message(Error(code, told), reply_to=msg)
