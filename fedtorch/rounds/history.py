"""The figures of a run, round by round, as Python has them."""

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from html import escape
from pathlib import Path
from typing import Any

from fedtorch.types import ConfigError

FILE = "metrics.jsonl"
"""File in a run folder: one JSON object a round."""

WIDE = re.compile(rb"\d{309}")
"""In a line of figures: digits of a number beyond all floats."""

COLUMNS = ("round", "train_loss", "nonprivate_train_loss", "privacy_epsilon")
"""Figures a short table shows, beside those of the test set."""


class History(list[dict[str, Any]]):
    """One dict a round, as ``Server.round`` gives them.

    >>> h = History([{"round": 1, "train_loss": 2.0}, {"round": 2, "train_loss": 1.5}])
    >>> h.column("train_loss")
    [(1, 2.0), (2, 1.5)]
    >>> h
    History(2 rounds: train_loss 1.5)
    """

    def __init__(self, rounds: Iterable[dict[str, Any]] = ()) -> None:
        """From dicts that name their ``round``."""
        super().__init__(rounds)

    @classmethod
    def load(cls, folder: str | Path) -> "History":
        """From the ``metrics.jsonl`` of a run folder; raises ConfigError naming a damaged line."""
        return cls(read(Path(folder) / FILE))

    def column(self, name: str) -> list[tuple[int, float]]:
        """(round, value) of every round that has this figure."""
        return [(int(m["round"]), m[name]) for m in self if isinstance(m.get(name), (int, float))]

    def last(self) -> dict[str, Any]:
        """Each figure as it stood last; a test figure may be of an earlier round."""
        found: dict[str, Any] = {}
        for metrics in self:
            found |= metrics
        return found

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each round; raises ConfigError without pandas."""
        try:
            import pandas
        except ImportError as e:
            raise ConfigError("to_pandas needs the package pandas: pip install pandas") from e
        return pandas.DataFrame(list(self)).set_index("round")

    def plot(self, *names: str) -> Any:
        """A matplotlib figure over rounds: a panel for each figure named, with clients' range as a band.

        Without names: the losses, each test figure, and epsilon where the run is private. A notebook shows
        it, ``.savefig("run.png")`` keeps it. Raises ConfigError naming a figure that no round has.
        """
        from fedtorch.rounds.plot import panels  # matplotlib takes its time

        there = {k for m in self for k, v in m.items() if isinstance(v, (int, float))} - {"round"}
        for name in names:
            if name not in there:
                near = get_close_matches(str(name), there, 1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                some = ", ".join(sorted(there)[:20]) or "none: no round was trained"
                raise ConfigError(f"no round has a figure {name!r}{hint} (there are {some})")
        asked = {n: [n] for n in names} if names else self.panels()
        if not asked:
            raise ConfigError("there is nothing to plot: no round was trained")
        lines = {
            title.replace("_", " "): {n.replace("_", " "): self.column(n) for n in found}
            for title, found in asked.items()
        }
        ends = {n: self.band(n) for n in there}
        bands = {
            n.replace("_", " "): e for n, e in ends.items() if len(e[0]) == len(self.column(n))
        }
        return panels(lines, bands)

    def band(self, name: str) -> tuple[Any, Any]:
        """The lowest and the highest client's figure, round by round; empty where no client's is known."""
        name = name.replace("train_loss", "client_loss")
        return self.column(f"{name}_min"), self.column(f"{name}_max")

    def panels(self) -> dict[str, list[str]]:
        """Title -> figures of the panels that are drawn unless others are asked for."""
        there = {k for m in self for k, v in m.items() if isinstance(v, (int, float))}
        tests = [k for k in self.last() if k.startswith("test_") and k in there]
        own = {t: f"validation_{t[5:]}" for t in tests}
        found = {
            "loss": [
                *("train_loss", "nonprivate_train_loss", "test_loss"),
                *("validation_loss", "nonprivate_validation_loss", "noised_loss"),
            ],
            **{t[5:]: [t, own[t], f"nonprivate_{own[t]}"] for t in tests if t != "test_loss"},
            "epsilon": [f"privacy_epsilon{k}" for k in ("", "_at_least", "_planned")],
        }
        if "noised_accuracy" in there:
            found["accuracy"] = [*found.get("accuracy", []), "noised_accuracy"]
        kept = {t: [n for n in names if n in there] for t, names in found.items()}
        return {t: names for t, names in kept.items() if names}

    def _names(self) -> list[str]:
        last = self.last()
        return [k for k in COLUMNS if k in last] + [k for k in last if k.startswith("test_")]

    def __repr__(self) -> str:
        """Length and last figures."""
        last = self.last()
        shown = ", ".join(f"{k} {last[k]:.4g}" for k in self._names() if k != "round")
        rounds = sum(m.get("round") != 0 for m in self)  # 0 is the score before any training
        return f"History({rounds} rounds{': ' if shown else ''}{shown})"

    def _repr_html_(self) -> str:
        """A table of the last ten rounds, as a notebook shows it."""
        names = self._names()
        head = "".join(f"<th>{escape(n.replace('_', ' '))}</th>" for n in names)
        body = "".join(
            "<tr>" + "".join(f"<td>{_short(m.get(n))}</td>" for n in names) + "</tr>"
            for m in self[-10:]
        )
        return f"<table><tr>{head}</tr>{body}</table>"


CAME, MISSED, LEFT_OUT = 1, 2, 3
"""A client in a round: its work counted, it did not come or was of no use, a robust rule left it out."""


def took_part(rounds: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, int]]:
    """Round -> client -> CAME, MISSED or LEFT_OUT; who was not asked is not in it."""
    found = {}
    for figures in rounds:
        here = dict[str, int]()
        for kind, name in ((CAME, "cohort"), (MISSED, "failed"), (LEFT_OUT, "left_out")):
            who = figures.get(name, figures.get(f"nonprivate_{name}"))
            here |= dict.fromkeys(map(str, who if isinstance(who, (list, dict)) else ()), kind)
        if int(figures["round"]):
            found[int(figures["round"])] = here
    return found


Scores = dict[str, dict[str, float]]
"""Client -> metric -> figure, as far as it has one."""


def by_client(rounds: Iterable[Mapping[str, Any]]) -> dict[int, Scores]:
    """Round -> clients' scores on their own validation data, where a round has them."""
    found = {}
    for figures in rounds:
        each = figures.get("validation_by_client", figures.get("nonprivate_validation_by_client"))
        if isinstance(each, dict) and each:
            found[int(figures["round"])] = {
                i: {k: v for k, v in s.items() if isinstance(v, (int, float))}
                for i, s in each.items()
                if isinstance(s, dict)
            }
    return found


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def read(path: Path) -> list[dict[str, Any]]:
    """The rounds of a file; raises ConfigError naming a damaged line.

    The half line that a kill can leave at the end is no round.
    """
    rounds, lost = sift(path.read_bytes()) if path.is_file() else ([], [])
    if lost:
        raise ConfigError(
            f"{path} is damaged in line {lost[0]}: delete that line to see the others"
        )
    return rounds


def sift(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rounds in a file's whole lines, and the numbers of the lines that hold none."""
    rounds, lost = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            if WIDE.search(line):
                raise ValueError("a number that no float holds")
            figures = json.loads(line)
            rounds.append(figures | {"round": int(figures["round"])})
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            lost.append(number)
    return rounds, lost
