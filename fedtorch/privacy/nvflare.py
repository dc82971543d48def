"""Filters for NVFLARE sites: what a site trained leaves noised and charged, or it does not leave.

NVFLARE's own base class of filters hands on whatever it cannot read. These block it.
"""

import copy
from pathlib import Path
from typing import Literal

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from fedtorch.privacy.alone import Budget, limit, multiplier
from fedtorch.privacy.answers import answer, has_receipt, tensor
from fedtorch.privacy.local import LocalDP
from fedtorch.types import ConfigError, OverBudget

SENT = "fedtorch_sent"
"""Property of a task's context: the weights that the server sent, of which results are the change."""

ROUNDS = (AppConstants.START_ROUND, AppConstants.CURRENT_ROUND, AppConstants.NUM_ROUNDS)
"""Headers that go back as the server sent them; all others stay at the site."""


class Gate(Filter):  # type: ignore[misc]
    """What both filters below do: they remember the task, and of a result nothing passes but weights."""

    def __init__(self, folder: str) -> None:
        """Ledgers are below ``folder``, each in a folder named after its site."""
        super().__init__()
        if not Path(folder).is_absolute():
            raise ConfigError(
                f"the filter's folder {folder} must be an absolute path: NVFLARE runs each job in a "
                "folder of its own, where a new ledger would begin"
            )
        self.folder = folder  # NVFLARE writes a job's filters down by the names of their arguments

    def let_go(self, result: DXO, task: Shareable, fl_ctx: FLContext) -> dict[str, Tensor]:
        """The weights that may leave; raises ConfigError or OverBudget where none may."""
        raise NotImplementedError

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """What may leave in place of ``shareable``; raises ContentBlockedException where nothing may."""
        if self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN:
            # trainers add to the arrays that they are given: changes are taken from a copy
            fl_ctx.set_prop(SENT, copy.deepcopy(shareable), private=True, sticky=False)
            return shareable
        code = shareable.get_return_code()
        if code != ReturnCode.OK:
            return make_reply(code)
        try:
            result, task = _weights(shareable, "the result"), fl_ctx.get_prop(SENT)
            if task is None:
                raise ConfigError(
                    "the filter did not see the task: name it under task_data_filters as well"
                )
            released = self.let_go(result, task, fl_ctx)
        except (ConfigError, OverBudget) as e:
            self.log_error(fl_ctx, f"nothing leaves: {e}", fire_event=False)
            raise ContentBlockedException(str(e)) from e
        data = {
            name: v if isinstance(result.data[name], Tensor) else v.numpy()
            for name, v in released.items()
        }
        reply = make_reply(ReturnCode.OK)
        for header in ROUNDS:
            if task.get_header(header) is not None:
                reply.set_header(header, task.get_header(header))
        return DXO(result.data_kind, data).update_shareable(reply)


class PrivateRelease(Gate):
    """Clips and noises a site's weights, and charges them to the site's own ledger before they leave.

    To be named in the ``privacy.json`` of the site, twice in every scope: under ``task_data_filters``,
    where it remembers what the server sent, and under ``task_result_filters``. Weights (WEIGHTS) and their
    changes (WEIGHT_DIFF) pass, as what they were: arrays or tensors of floats with noise on them, others as
    the server sent them. Metrics, counts of steps, headers and every other kind of result do not pass. That
    a task failed is told, by NVFLARE's return code alone.

    Guarantee: that of ``LocalDP``, for the whole of the site's data and all that passes the filter, over
    all jobs and restarts. It does not bind code that a job brings along, nor events that a job streams.
    """

    def __init__(
        self,
        folder: str,
        *,
        rounds: int | None = None,
        epsilon: float | None = None,
        delta: float = 1e-5,
        clip: float = 1.0,
        noise_multiplier: float | None = None,
        mechanism: Literal["gaussian", "laplace"] = "gaussian",
        most: float | None = None,
    ) -> None:
        """Options of ``LocalDP``, and ``most`` of a ``Budget``.

        The ledger is in ``folder``, in one named after the site. Raises ConfigError where there is no limit
        or no such plan.
        """
        super().__init__(folder)
        self.rounds, self.most = rounds, most
        self.epsilon, self.delta, self.clip = epsilon, delta, clip
        self.noise_multiplier, self.mechanism = noise_multiplier, mechanism
        multiplier(plan := self._plan()), limit(plan, most)

    def _plan(self) -> LocalDP:
        return LocalDP(
            rounds=self.rounds,
            epsilon=self.epsilon,
            delta=self.delta,
            clip=self.clip,
            noise_multiplier=self.noise_multiplier,
            mechanism=self.mechanism,
        )

    def let_go(self, result: DXO, task: Shareable, fl_ctx: FLContext) -> dict[str, Tensor]:
        """Charged, clipped and noised."""
        sent = _weights(task, "the task").data
        site = str(fl_ctx.get_identity_name())
        budget = Budget(Path(self.folder) / site, self._plan(), site=site, most=self.most)
        number = task.get_header(AppConstants.CURRENT_ROUND)
        round, full = number if isinstance(number, int) else 0, result.data_kind == DataKind.WEIGHTS
        released = answer(result.data, sent, budget, round, full)
        self.log_info(
            fl_ctx, f"released at epsilon {budget.spent:.4f} of {budget.most:g}", fire_event=False
        )
        return released


class PrivatelyTrained(Gate):
    """Lets those weights pass, to the bit, that private training at the site has released last.

    In the place of ``PrivateRelease``, twice as well, where ``fedtorch.sites.inside.PrivateVisits`` trains
    with the budget's folder ``folder/<name of the site>``: a script that sends anything else by mistake
    sends nothing. Metrics, counts, headers and changes of weights (WEIGHT_DIFF) do not pass.
    """

    def let_go(self, result: DXO, task: Shareable, fl_ctx: FLContext) -> dict[str, Tensor]:
        """As they are, where the site's training knows them."""
        weights = {name: tensor(name, v) for name, v in result.data.items()}
        whole = result.data_kind == DataKind.WEIGHTS
        if not whole or not has_receipt(
            Path(self.folder) / str(fl_ctx.get_identity_name()), weights
        ):
            raise ConfigError(
                "these are not the weights that private training at this site has released last"
            )
        return weights


def _weights(shareable: Shareable, what: str) -> DXO:
    try:
        dxo = from_shareable(shareable)
    except ValueError as e:
        raise ConfigError(f"{what} cannot be read: {e}") from e
    if dxo.data_kind not in (DataKind.WEIGHTS, DataKind.WEIGHT_DIFF):
        raise ConfigError(f"{what} is of the kind {dxo.data_kind}, which no noise covers")
    return dxo
