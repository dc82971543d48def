"""The options of tables, whatever they come from."""

from dataclasses import dataclass, field
from typing import Literal

from fedtorch.data import columns
from fedtorch.data.sheet import Format
from fedtorch.options import SHARE, check
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How a table becomes data."""

    test: str = ""
    """A file with the central test; empty: a share of the rows."""
    target: str = ""
    """Column to predict; empty: the last one."""
    client: str = ""
    """Column that names each row's owner; empty: none, or the file where they are several."""
    person: str = ""
    """Column that says whose each row is: not learned from, but the rows of one person, over all clients,
    get an epsilon together; see privacy.person."""
    kind: str = "auto"
    """classification, binary, regression, or auto: asked for where whole numbers could be either."""
    standardize: bool | Literal["private"] = False
    """true: scale by the training rows' mean and deviation, which no privacy plan covers. private: scale
    the columns in bounds by statistics that the plan releases and pays for."""
    statistics: Literal["quartiles", "sums"] = "quartiles"
    """Private statistics: quartiles, or sums (mean and deviation: for tens of thousands of rows)."""
    bounds: list[str] = field(default_factory=list)
    """Public ranges, age=20:90: scaled to -1 to 1 by them; for private statistics a rough range will do."""
    categories: list[str] = field(default_factory=list)
    """Public categories, ward=a|b|c: an input for each, one for any other; a name alone, or found for all
    columns of names: those that are there, without privacy."""
    missing: Literal["", "drop", "mean", "median", "indicator"] = ""
    """Missing values: refused; drop the row; mean or median of the column; indicator: an input that says
    so. A category that is missing is another one."""
    fill: list[str] = field(default_factory=list)
    """Public values for missing numbers: chol=240."""
    test_fraction: float = 0.2
    """Share of rows kept for the central test, each by its content; 0: none."""
    features: list[str] = field(default_factory=list)
    """Columns to learn from; none given: all but the target's, the client's and those dropped."""
    drop: list[str] = field(default_factory=list)
    """Columns to leave out."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in order, where files of several sites must agree; none: sorted."""
    positive: list[str] = field(default_factory=list)
    """Values of the target that mean yes; all others mean no."""
    columns: list[str] = field(default_factory=list)
    """Names of the columns in order, where the files have no line of them."""
    separator: str = ""
    """One character, tab or space; empty: guessed among , ; tab | and space."""
    encoding: str = ""
    """Such as latin-1; empty: UTF-8, or UTF-16 where a mark says so."""
    decimal: str = "."
    """Decimal separator: . or ,"""
    na: list[str] = field(default_factory=list)
    """Further spellings of a missing value, such as -9."""

    def __post_init__(self) -> None:
        """Refuse shares that leave nothing, and options that do not go together."""
        check(self, "dataset", test_fraction=SHARE)
        _ = self.how
        bounds = columns.ranges(self.bounds)
        if self.standardize is True and bounds:
            raise ConfigError(
                "dataset.standardize and dataset.bounds both scale: give one, or --dataset.standardize "
                "private, which needs bounds"
            )
        if self.standardize == "private" and not bounds:
            raise ConfigError(
                "dataset.standardize private needs a rough public range of each column that it scales: "
                "--dataset.bounds age=0:120,chol=0:600"
            )
        if self.positive and (self.classes or self.kind == "regression"):
            raise ConfigError(
                "dataset.positive makes the target yes or no: leave out dataset.classes and regression"
            )

    @property
    def how(self) -> Format:
        """How the files are written."""
        return Format(
            self.separator, self.encoding, tuple(self.columns), self.decimal, tuple(self.na)
        )
