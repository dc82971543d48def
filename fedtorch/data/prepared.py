"""Preparation of the data: said in one line, kept with the run, done again to predict.

``data.json`` in the run folder holds it, with a fingerprint of the data. It is for the owner alone (0600):
a digest of private data says whether a guess of them is right.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.data.base import Data, Preparation
from fedtorch.data.content import fingerprint
from fedtorch.types import ConfigError

FILE = "data.json"
FORMAT = "fedtorch data 2"
OPTIONS = {"columns": "features", "classes": "classes"}
"""Which option of a dataset says what is in what order."""
MOST_NAMES = 12
"""Names that a line shows of many."""


@dataclass(frozen=True)
class Prepared:
    """All that a trained model needs of its data, and how to know the data again."""

    name: str
    kind: str
    outputs: int
    facts: dict[str, Any]
    """What the model was built from; plain values alone, see ``missing``."""
    preparation: Preparation
    missing: tuple[str, ...] = ()
    """Facts of a custom dataset that are no plain values: only loading the data gives them again."""
    train: str = ""
    """Fingerprint of the training examples."""
    test: str = ""
    """Fingerprint of the central test."""
    sizes: tuple[int, ...] = field(default=(0, 0))
    """Training and test examples."""
    owners: str = ""
    """Fingerprint of who holds which training example; of older runs, and where nobody is named, none."""

    @classmethod
    def of(cls, data: Data) -> "Prepared":
        """The preparation of loaded data."""
        plain = {k: v for k, v in data.facts.items() if _holds_plain(v)}
        return cls(
            data.name,
            data.kind,
            data.outputs,
            plain,
            data.preparation,
            tuple(k for k in data.facts if k not in plain),
            fingerprint(data.train),
            fingerprint(data.test),
            (len(data.train), len(data.test)),  # type: ignore[arg-type]
            _digest(data.keys) if data.keys is not None else "",
        )

    def same(self, other: "Prepared") -> bool:
        """Whether the data are the same, example by example, of the same owners and prepared alike."""
        if self.owners and other.owners and self.owners != other.owners:
            return False
        return (self.train, self.test, self.preparation) == (
            other.train,
            other.test,
            other.preparation,
        )

    def save(self, folder: Path) -> None:
        """Write ``data.json`` whole or not at all, for the owner's eyes."""
        try:
            with disk.whole(folder / FILE, private=True) as file:
                table = {"format": FORMAT, **asdict(self)}
                file.write(json.dumps(table | {"sha256": _sum(table)}, indent=2).encode())
        except OSError as e:
            raise ConfigError(f"{folder / FILE} cannot be written: {e.strerror}") from e


def _digest(names: Sequence[str]) -> str:
    """Of names in this order; a length before each, as a name may hold anything."""
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        encoded = str(name).encode(errors="surrogatepass")
        found.update(len(encoded).to_bytes(8) + encoded)
    return found.hexdigest()


def load(folder: Path) -> Prepared | None:
    """The preparation that a run kept; None for older runs. Raises ConfigError if it is damaged."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if table.pop("sha256") != _sum(table):
            raise ValueError("its digest does not match")
        if table.pop("format") != FORMAT:
            raise ValueError("another version wrote it")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror}") from e
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ConfigError(f"{path} is damaged: {e}") from e
    return read(table, path)


def read(table: dict[str, Any], path: Path) -> Prepared:
    """From a table as ``asdict`` gives it; raises ConfigError naming ``path`` if it is damaged."""
    try:
        table = {k: _tuples(v) for k, v in table.items()}
        table["facts"] = {str(k): _tuples(v) for k, v in table["facts"].items()}
        steps = {k: _tuples(v) for k, v in dict(table.pop("preparation")).items()}
        return Prepared(preparation=Preparation(**steps), **table)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ConfigError(f"{path} is damaged: {e}") from e


def paid(folder: Path, data: Data) -> Prepared | None:
    """The preparation of the run that goes on, where ``data`` wait for statistics; None: they do not.

    Raises ConfigError where it is gone: what was released, and paid for, is in it.
    """
    if data.asks is None:
        return None
    kept = load(folder)
    if kept is None:
        raise ConfigError(
            f"{folder / FILE} is gone, which holds the private statistics that the run's data are scaled "
            "by: put it back, or start a new run"
        )
    return kept


def resumed(folder: Path, data: Data) -> None:
    """Raises ConfigError unless ``data`` are those the run in ``folder`` was trained on so far."""
    kept = load(folder)
    if kept is None:
        print(
            f"warning: {folder / FILE} is gone: whether the data are those of the run is not known"
        )
    elif not kept.same(now := Prepared.of(data)):
        raise ConfigError(
            f"the run in {folder} was trained on other data ({kept.sizes[0]} training and "
            f"{kept.sizes[1]} test examples then, {now.sizes[0]} and {now.sizes[1]} now, or other "
            "contents): a resumed run needs the same; a custom dataset must draw its random numbers from "
            "torch's, NumPy's or Python's global generators, which the seed decides, or from its own seeds"
        )


def covered(preparation: Preparation) -> None:
    """Raises ConfigError where a step was taken from the rows themselves: no noise covers that."""
    if preparation.derived:
        raise ConfigError(
            f"{preparation.derived[0]} voids the privacy claim: every example moves what all are prepared "
            "by, and nobody noises it"
        )


def agreed(data: Data, dataset: Any) -> None:
    """Raises ConfigError where a file decided alone what sites must agree on: classes, inputs."""
    if data.preparation.found:
        raise ConfigError(
            f"{data.name}: the categories of {', '.join(data.preparation.found)} would be those of this "
            "file alone, and sites must agree: give every site the same --dataset.categories NAME=A|B"
        )
    declared = getattr(dataset, "classes", None) or getattr(dataset, "positive", None)
    if data.preparation.classes and not declared:
        names = ",".join(str(c) for c in data.preparation.classes)
        raise ConfigError(
            f"{data.name}: its classes ({names}) would be numbered by what is in this file alone, and "
            f"sites must agree: give every site the same --dataset.classes, such as {names}"
        )


def same_names(data: Data, columns: Sequence[str], classes: Sequence[str]) -> None:
    """Raises ConfigError where a table's columns, or the classes, are not those that sites agreed on.

    None given, or none known of these data: nothing is compared.
    """
    done = data.preparation
    known = {"columns": (done.columns, columns), "classes": (done.classes, classes)}
    for what, (names, wanted) in known.items():
        ours = [str(name) for name in names]
        if not ours or not wanted or ours == [*wanted]:
            continue
        pairs = [*zip_longest(ours, wanted)]
        at, (own, other) = next((k, p) for k, p in enumerate(pairs, 1) if p[0] != p[1])
        how = "in another order" if sorted(ours) == sorted(wanted) else "others"
        raise ConfigError(
            f"{data.name}: its {what} are {how} than sites agreed on: number {at} is "
            f"{own or 'not there'}, and should be {other or 'not there'} (--dataset.{OPTIONS[what]})"
        )


def undeclared(data: Data, dataset: Any) -> str:
    """What to say under a privacy plan of classes that the rows themselves made known; empty: nothing."""
    names = getattr(dataset, "classes", None)
    if names is None or names or data.kind != "classification" or getattr(dataset, "positive", ()):
        return ""
    classes = [*data.preparation.classes] or [*range(data.outputs)]
    return (
        f"that there are these {len(classes)} classes was read off the rows, which no noise covers: "
        f"--dataset.classes {','.join(map(str, classes[:MOST_NAMES]))}"
        f"{',...' if len(classes) > MOST_NAMES else ''} declares them"
    )


def said(data: Data, strict: bool = False) -> str:
    """The one line that says what the data were taken for; ``strict`` leaves out what tells of rows."""
    p = data.preparation
    classes = f" ({_some([*p.classes] or [f'0 to {data.outputs - 1}'])})"
    task = {
        "classification": f"classification into {data.outputs} classes{classes}",
        "binary": "yes or no (one logit each)" + (classes if p.classes else ""),
        "regression": f"regression of {data.outputs} numbers" if data.outputs > 1 else "regression",
    }[data.kind]
    shape = "x".join(map(str, data.facts.get("input_shape", ()))) or "of their own kind"
    scaled = f"divided by {p.scale:g}" if p.scale != 1 else "taken as they are"
    if p.mean:
        scaled = p.scaled or "scaled to mean 0 and deviation 1"
    parts = [f"data: {task}", f"inputs {shape} {scaled}"]
    if p.columns:
        parts.append(f"features {_some(p.columns)}")
        parts.append(f"target {p.target}")
        parts.append(f"clients by {p.client}" if p.client else "no column names clients")
    else:
        parts.append("the data name clients" if data.keys else "the data name no clients")
    if p.dropped:
        parts.append(f"left out {_some([d or '(a column without a name)' for d in p.dropped])}")
    return "; ".join([*parts, *p.notes, *(() if strict else p.remarks)])


def _sum(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _some(names: Sequence[Any]) -> str:
    shown = ", ".join(str(n)[:30] for n in names[:MOST_NAMES])
    return f"{shown}, ... {len(names)} in all" if len(names) > MOST_NAMES else shown


def _holds_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_holds_plain(v) for v in value)
    return value is None or type(value) in (bool, int, float, str)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
