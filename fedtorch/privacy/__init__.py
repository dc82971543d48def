"""Private training: four plans and the one without privacy, one ledger for the whole run."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.privacy.adaptive import AdaptiveClip
    from fedtorch.privacy.alone import Budget
    from fedtorch.privacy.bands import Bands
    from fedtorch.privacy.base import STATISTICS_NOISE, Privacy
    from fedtorch.privacy.client import ClientLevel
    from fedtorch.privacy.distributed import DistributedDP
    from fedtorch.privacy.local import LocalDP
    from fedtorch.privacy.nothing import Nothing
    from fedtorch.privacy.sample import DEFAULT, SampleLevel
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = [
    "DEFAULT",
    "STATISTICS_NOISE",
    "AdaptiveClip",
    "Bands",
    "Budget",
    "ClientLevel",
    "DistributedDP",
    "LocalDP",
    "Nothing",
    "Privacy",
    "SampleLevel",
]
