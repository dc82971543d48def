"""How what clients send becomes one change of the model."""

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
