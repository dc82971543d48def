"""How what clients send becomes one change of the model."""

from typing import TYPE_CHECKING

from fedtorch.lazy import offers

if TYPE_CHECKING:
    from fedtorch.aggregation.mean import Aggregator, Mean
    from fedtorch.aggregation.mixing import NNM, Bucketing
    from fedtorch.aggregation.robust import Median, TrimmedMean
    from fedtorch.aggregation.rows import Robust
    from fedtorch.aggregation.vectors import (
        Bulyan,
        CentredClip,
        FLTrust,
        GeometricMedian,
        Krum,
        MultiKrum,
        NormBound,
    )
else:
    __getattr__, __dir__ = offers(__name__, __file__)

__all__ = [
    "NNM",
    "Aggregator",
    "Bucketing",
    "Bulyan",
    "CentredClip",
    "FLTrust",
    "GeometricMedian",
    "Krum",
    "Mean",
    "Median",
    "MultiKrum",
    "NormBound",
    "Robust",
    "TrimmedMean",
]
