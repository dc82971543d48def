"""The options of local training; checks of options by annotation and range; what a dotted name stands for.

True is no number, text is no number, and NaN is in no range. NumPy's numbers become Python's.
"""

import difflib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fedtorch.types import ConfigError


class Range(NamedTuple):
    """Numbers an option may be; the ends belong to it unless they are ``open``."""

    words: str
    low: float
    high: float
    open: str = ""
    """``low``, ``high``, both or neither."""

    def holds(self, value: Any) -> bool:
        """Whether ``value``, a number, lies in it; NaN never does."""
        above = value > self.low if "low" in self.open else value >= self.low
        return bool(above and (value < self.high if "high" in self.open else value <= self.high))


POSITIVE = Range("a positive number", 0, math.inf, "low high")
NOT_NEGATIVE = Range("a number >= 0", 0, math.inf, "high")
COUNT = Range("at least 1", 1, math.inf, "high")
RATE = Range("in (0, 1]", 0, 1, "low")
SHARE = Range("in [0, 1)", 0, 1, "high")
FRACTION = Range("in [0, 1]", 0, 1)
INSIDE = Range("between 0 and 1", 0, 1, "low high")
ANY = Range("a number", -math.inf, math.inf)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a client goes through its data in a visit; recipes, configs and offers to sites have these."""

    lr: float | None = None
    """Client learning rate before the schedule; none: 0.1, and 1 under sample-level privacy, where
    gradients are clipped."""
    epochs: int = 2
    """Passes over a client's data in a round."""
    steps: int | None = None
    """Local steps in a round, in place of epochs."""
    batch_size: int | None = 16
    """Examples in a local step; null (None): all of a client's."""
    drop_last: bool = False
    """Leave out the last, smaller batch of each pass (clients smaller than a batch keep theirs)."""
    accumulate: int = 1
    """Batches that make one local step, by the mean gradient of all their examples: a large batch in the
    memory of a small one."""
    clip_norm: float | None = None
    """Largest norm of a local step's gradient, as clip_grad_norm_ of torch; not privacy.clip: it hides
    nothing."""
    lr_warmup: int = 0
    """Local steps at the start of each visit over which the learning rate rises to its full size."""
    lr_decay: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls over the rest of a visit; schedule is over rounds."""
    lr_floor: float = 0.0
    """What share of the learning rate is left at a visit's end."""

    def __post_init__(self) -> None:
        """Refuse what cannot train, by name."""
        counts = dict.fromkeys(("epochs", "steps", "batch_size", "accumulate"), COUNT)
        rates = {"lr": POSITIVE, "lr_warmup": NOT_NEGATIVE, "lr_floor": FRACTION}
        check(self, "", clip_norm=POSITIVE, **counts, **rates)

    def training(self) -> dict[str, Any]:
        """These options by name, to hand on."""
        return {f.name: getattr(self, f.name) for f in fields(TrainingOptions)}


def check(options: Any, where: str, **ranges: Range) -> None:
    """Check a frozen dataclass of options; ``where`` is what its options are called by in a config.

    Raises ConfigError that names the first option of a wrong type, or out of its range.
    """
    owner: Any = type(options)
    hints = _hints(owner)
    for f in fields(options):
        name, given = f"{where}.{f.name}" if where else f.name, getattr(options, f.name)
        value = fit(name, given, hints.get(f.name, Any))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            within(name, value, ranges.get(f.name, ANY))
        if value is not given:
            object.__setattr__(options, f.name, value)


def within(name: str, value: float, allowed: Range) -> None:
    """Refuse a number out of range."""
    if not allowed.holds(value):
        raise ConfigError(f"{name} must be {allowed.words}, got {value}")


def fit(name: str, value: Any, kind: Any) -> Any:
    """``value``, in Python's own types, if it is of this ``kind``; raises ConfigError if not."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for one in kinds:
        fits, found = _as(value, one)
        if fits:
            return found
    words = dict.fromkeys(_words(k) for k in kinds)
    # a class where one of its objects, or a function, is asked for
    fix = f" (write {value.__name__}(...))" if isinstance(value, type) and str not in kinds else ""
    raise ConfigError(f"{name} must be {' or '.join(words)}, got {shown(value)}{fix}")


def typed(part: object) -> str:
    """The name of a choice's class as options write it: TrimmedMean is trimmed-mean, FedAvg is fedavg."""
    return re.sub("(?<=[a-z])(?<!Fed)(?=[A-Z][a-z])", "-", type(part).__name__).lower()


def shown(value: Any) -> str:
    """A wrong value in a message: short, and never the numbers of somebody's data."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    plain = isinstance(value, (str, int, float, bool, NoneType))
    return repr(value)[:60] if plain else type(value).__name__


@cache
def _hints(cls: Any) -> Mapping[str, Any]:
    try:
        return get_type_hints(cls)
    except (NameError, TypeError):  # an annotation that only its author understands
        return {}


def _as(value: Any, kind: Any) -> tuple[bool, Any]:
    """Whether a value is of one kind, and what it is then."""
    if kind is Any:
        return True, value
    number = isinstance(value, Real) and not isinstance(value, bool)
    origin = get_origin(kind) or kind
    if kind is int:
        fits = number and isinstance(value, Integral)
        return fits, int(value) if fits else value
    if kind is float:
        number = number and not (isinstance(value, int) and abs(value) > 10**300)
        return number, value if isinstance(value, (int, float)) or not number else float(value)
    if kind is bool:  # NumPy's is a type of its own
        fits = isinstance(value, bool) or (
            type(value).__name__ == "bool" and hasattr(value, "item")
        )
        return fits, bool(value) if fits else value
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in get_args(kind)), value
    if origin is list:
        (inner,) = get_args(kind) or (Any,)
        return isinstance(value, list) and all(_as(v, inner)[0] for v in value), value
    if origin is Callable:
        return callable(value) and not isinstance(value, type), value
    if not isinstance(origin, type):
        return True, value
    # an object that does all that the class does will do in its place
    does = [k for k, v in vars(origin).items() if k[0] != "_" and callable(v)]
    alike = bool(does) and not isinstance(value, type) and all(hasattr(value, k) for k in does)
    return alike or (not _protocol(origin) and isinstance(value, origin)), value


def _protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def _words(kind: Any) -> str:
    plain: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "text",
    }
    plain |= {dict: "a dict", list: "a list", Sequence: "a list", NoneType: "None", None: "None"}
    if kind in plain:
        return plain[kind]
    origin = get_origin(kind) or kind
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    if origin is list:
        return f"a list, each {_words(*get_args(kind))}"
    if origin is dict:
        return "a dict"
    if origin is Callable:
        return "a function"
    name = getattr(origin, "__name__", str(origin))
    return f"an {name}" if name[0] in "AEIOU" else f"a {name}"


CLAIM = ("epsilon", "delta")
"""What a privacy plan promises, which is told in any case."""


def brief(part: Any) -> str:
    """A dataclass in a line: what differs from its defaults, ``FedProx(mu=0.1)``; functions by name."""
    shown = [
        f"{f.name}={getattr(value, '__name__', None) or repr(value)}"
        for f in fields(part)
        if f.repr
        and (value := getattr(part, f.name)) is not None
        and (f.name in CLAIM or not _usual(f, value))
    ]
    return f"{type(part).__name__}({', '.join(shown)})"


def _usual(f: "Field[Any]", value: Any) -> bool:
    if f.default_factory is not MISSING:
        return bool(value == f.default_factory())
    return f.default is not MISSING and (value is f.default or bool(value == f.default))


def briefly(cls: type) -> None:
    """Let a class and what is made of it be shown by ``brief``; for ``__init_subclass__``."""
    if "__repr__" not in vars(cls):
        cls.__repr__ = brief  # type: ignore[assignment]


def near(word: str, known: Iterable[str], meant: Mapping[str, str] | None = None) -> str:
    """``; did you mean rounds?`` of what comes near a wrong word; nothing where nothing does.

    ``meant``: what some words are likely to mean, whatever they come near.
    """
    plain = {k.replace("_", "-").lower(): k for k in known}
    asked = word.replace("_", "-").lower()
    if meant and asked in meant:
        return f"; did you mean {meant[asked]}?"
    begun = [k for k in plain if len(asked) > 2 and k.startswith(asked)]
    found = (begun or difflib.get_close_matches(asked, plain, cutoff=0.7))[:2]
    return f"; did you mean {' or '.join(plain[f] for f in found)}?" if found else ""


def as_typed(message: str, argv: Sequence[str]) -> str:
    """A message with options named as they were typed: ``--batch-size`` for ``batch_size``."""
    for word in argv:
        typed = word.partition("=")[0]
        key = typed[2:].replace("-", "_")
        if typed.startswith("--") and ("-" in typed[2:] or "." in key):
            message = re.sub(rf"(?<![\w.\-]){re.escape(key)}(?![\w.]*\w)", typed, message)
    return message


def find(path: str) -> Any:
    """``package.module:name`` or ``package.module.name`` -> the object; raises ConfigError."""
    where, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    found = imported(where, path)
    try:
        return getattr(found, name)
    except Exception as e:  # a module may look its names up by code of its own
        raise ConfigError(f"cannot import {path!r}: {e}") from e


def imported(name: str, path: str = "") -> ModuleType:
    """A module by its name; one of the working folder too. ``path``: what was asked for."""
    if name.partition(".")[0] != "fedtorch":
        from_here()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as e:  # a user's module can fail in any way while it is imported
        raise ConfigError(f"cannot import {path or name!r}: {type(e).__name__}: {e}") from e


def run_file(name: str, path: Path) -> ModuleType:
    """A file of Python as the module ``name``; raises whatever it raises, and ImportError for another."""
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look modules up by name
    spec.loader.exec_module(module)
    return module


def from_here() -> None:
    """Find modules of the working folder too, after all others, as code of the user's own expects.

    Only once such code is asked for: until then a file that lies there, whoever put it there, is never
    taken for a package that is not installed.
    """
    if "" not in sys.path:
        sys.path.append("")
