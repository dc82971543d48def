"""The price of a release, and the account of a run."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.privacy.accounting.events import Event, calibrate, epsilon
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = ["Event", "calibrate", "epsilon"]
