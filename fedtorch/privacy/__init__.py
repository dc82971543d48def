"""Private training: four plans and the one without privacy, one ledger for the whole run."""

from fedtorch.privacy.adaptive import AdaptiveClip
from fedtorch.privacy.bands import Bands
from fedtorch.privacy.base import STATISTICS_NOISE, Privacy
from fedtorch.privacy.client import ClientLevel
from fedtorch.privacy.distributed import DistributedDP
from fedtorch.privacy.local import LocalDP
from fedtorch.privacy.nothing import Nothing
from fedtorch.privacy.sample import SampleLevel

__all__ = [
    "DEFAULT",
    "STATISTICS_NOISE",
    "AdaptiveClip",
    "Bands",
    "ClientLevel",
    "DistributedDP",
    "LocalDP",
    "Nothing",
    "Privacy",
    "SampleLevel",
]

DEFAULT = SampleLevel()
"""The plan of ``fedtorch train`` and ``fedtorch serve`` where none is named."""
