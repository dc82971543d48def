"""Tables of options -> objects, and back.

A choice names one of a few classes or, by dotted path, a class of the user's own; its options are that
class's constructor arguments. jsonargparse checks and converts the values.
"""

import dataclasses
import inspect
import json
import os
import re
import threading
import tomllib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from fedtorch.options import find, near
from fedtorch.run.names import (
    CALLED,
    CHOICES,
    FREE,
    NEAR,
    NONE_USUAL,
    OFF,
    SEVERAL,
    WANTED,
    flag,
    grouped,
    ours,
    written,
)
from fedtorch.types import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

LISTS = (list[str], list[int], tuple[str, ...])

Table = dict[str, Any]

ONE = threading.Lock()
"""jsonargparse keeps what it parses in its module: two threads at once refuse each other's options."""


def construct(cls: Callable[..., Any], table: Table, where: str = "") -> Any:
    """Call ``cls`` with a table of options; nested choices are built first."""
    args: Table = {}
    plain: Table = {}
    takes = inspect.signature(cls).parameters
    for key, given in table.items():
        full, value = f"{where}.{key}" if where else key, home(given)
        if key not in takes:
            known = ", ".join(takes) or "none"
            label = f"{where} {_short(where, cls)}" if where else "the config"
            hint = _others(where, key) or near(key, takes, _called(takes))
            raise ConfigError(f"{label} has no option {key!r}; it has {known}{hint}")
        if full in SEVERAL:
            args[key] = several(full, value)
        elif full in CHOICES:
            args[key] = choose(full, value, takes[key].default)
            if args[key] is None and takes[key].default is not None and not _optional(takes[key]):
                usual = written(takes[key].default)
                raise ConfigError(
                    f"{full} cannot be left out: {usual} is what a run has without it"
                )
        elif full in FREE:
            name, options = _named(value)
            if name is not None:
                args[key] = str(name)
            asked = {k: _literal(home(v)) for k, v in options.items()}
            args[f"{key}_args"] = _listed(asked) if key == "optimizer" else asked
        elif takes[key].annotation == dict[str, Any]:  # the parser would import a class named in it
            args[key] = _table(full, _literal(value))
        elif takes[key].annotation in LISTS and isinstance(value, str):
            plain[key] = _parts(value)
        else:
            plain[key] = value
    skip = {k for k in takes if (f"{where}.{k}" if where else k) in CHOICES or k in FREE} | {*args}
    return cls(**_checked(cls, plain, skip, where), **args)


def _others(choice: str, option: str) -> str:
    """Which names of a choice have an option, in words; nothing where none has."""
    table = CHOICES.get(choice, {})
    names = [n for n, path in table.items() if option in inspect.signature(find(path)).parameters]
    return f" (--{choice} {' or '.join(names)} has it)" if names else ""


def _called(takes: Iterable[str]) -> dict[str, str]:
    """What others call these options -> ours."""
    return {other: ours for other, ours in CALLED.items() if ours in takes}


def _optional(parameter: inspect.Parameter) -> bool:
    return NoneType in get_args(parameter.annotation) or parameter.annotation is Any


def _short(choice: str, cls: Callable[..., Any]) -> str:
    """The name of a class as a user gives it."""
    names = {find(path): name for name, path in CHOICES.get(choice, {}).items()}
    return names.get(cls, getattr(cls, "__name__", str(cls)))


def home(value: Any) -> Any:
    """A path with the home folder in place of ``~``, which no shell expands in a file or after ``=``."""
    at_home = isinstance(value, str) and (value == "~" or value.startswith(("~/", "~\\")))
    return os.path.expanduser(value) if at_home else value


def choose(choice: str, value: Any, default: Any = None) -> Any:
    """``"fedprox"`` or ``{"name": "fedprox", "mu": 0.1}`` -> the object.

    Options without a name are those of the ``default``; where there is none, of the first choice. Raises
    ConfigError where none of the choices is usual.
    """
    name, options = _named(ours(choice, value))
    if name is None and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return construct(type(default), options, choice)
    if name is None:
        if options and choice in NONE_USUAL:
            given = ", ".join(f"{choice}.{k}" for k in options)
            raise ConfigError(
                f"{given} without --{choice}: name one of {', '.join(CHOICES[choice])}"
            )
        name = next(iter(CHOICES[choice]))
    if str(name).lower() == "true" and "on" in CHOICES[choice]:
        name = "on"
    if str(name).lower() in OFF:
        if options:
            given = ", ".join(f"{choice}.{k}" for k in options)
            raise ConfigError(
                f"{choice} is {name}, which has no {given}: leave out one or the other"
            )
        return None
    return construct(_class(choice, str(name)), options, choice)


def several(choice: str, value: Any) -> tuple[Any, ...]:
    """``"topk:0.01,qsgd"``, a table or a list of such -> the objects, in order.

    What stands behind a colon is the first option of the part's own. An option given beside several names
    is that of the one part that has it.
    """
    made: list[Any] = []
    for names, options in grouped(choice, value):
        if [n.lower() for n, _ in names] in [[word] for word in (*OFF, "")]:
            choose(choice, {"name": "none", **options})  # which takes no options
            continue
        tables = [{"name": n} | _behind(choice, n, of) for n, of in names]
        for key, given in options.items():
            takers = [t for t in tables if key in _options(choice, t["name"])] or tables[:1]
            if len(takers) > 1 or key in takers[0]:
                raise ConfigError(
                    f"{choice}.{key} is for {' or '.join(t['name'] for t in takers)}, or given twice: "
                    f'write each part as a table of its own, {choice} = [{{name = "...", {key} = ...}}]'
                )
            takers[0][key] = given
        made += [choose(choice, table) for table in tables]
    return tuple(made)


def _options(choice: str, name: str) -> list[str]:
    return [*inspect.signature(_class(choice, name)).parameters]


def _behind(choice: str, name: str, of: str | None) -> Table:
    """What stands behind a part's colon, as its first own option."""
    if of is None:
        return {}
    shared = inspect.signature(find(WANTED[choice][0])).parameters
    own = [k for k in _options(choice, name) if k not in shared]
    if not own:
        raise ConfigError(f"{choice} {name} has no option to stand behind a colon: leave out :{of}")
    return {own[0]: of}


def describe(obj: Any) -> Any:
    """The table that builds ``obj`` again: what goes into config.toml, logs and checkpoints."""
    if not dataclasses.is_dataclass(obj):
        return obj
    table = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj) if f.init}
    for key in FREE & table.keys():
        options = table.pop(f"{key}_args")
        table[key] = {"name": table[key], **options} if options else table[key]
    # TOML has no null: the word stands for it where leaving the option out would mean something else
    defaults = {f.name: f.default for f in dataclasses.fields(obj)}
    empty = {k for k, v in table.items() if v is None}
    kept = {k: "null" for k in empty if defaults.get(k) is not None}
    return {k: _entry(v) for k, v in table.items() if k not in empty} | kept


def _entry(value: Any) -> Any:
    if isinstance(value, tuple):
        parts = [_entry(v) for v in value]
        return parts[0] if len(parts) == 1 and isinstance(parts[0], dict) else parts
    if not dataclasses.is_dataclass(value):
        return value
    own = type(value).__name__
    for names in CHOICES.values():
        for name, dotted in names.items():
            # to find one of another name would import all that a run may have, for what this one has not
            if dotted.endswith(f".{own}") and find(dotted) is type(value):
                return {"name": name, **describe(value)}
    return {"name": f"{type(value).__module__}.{own}", **describe(value)}


def _class(choice: str, name: str) -> Callable[..., Any]:
    names = CHOICES[choice]
    if name.lower() in names:
        return find(names[name.lower()])  # type: ignore[no-any-return]
    if choice == "dataset" and os.path.exists(name):
        raise ConfigError(
            f"dataset {name!r} is where data lie, and no kind of data: --dataset {_kind(name)} "
            f"--dataset.path {name}"
        )
    if [*names] == ["on"] and not re.fullmatch(r"[^\W\d]\w*([.:]\w+)+", name):
        option = next(iter(inspect.signature(find(names["on"])).parameters))
        words = f"{flag(choice)} is on or none, and {name!r} neither"
        raise ConfigError(f"{words}: what it takes are options such as {flag(choice)}.{option}")
    if "." not in name and ":" not in name:
        raise ConfigError(
            f"unknown {choice} {name!r}; there are {', '.join(names)}, or give the dotted path of a class "
            f"of your own{near(name, names, NEAR.get(choice))}"
        )
    found = find(name)
    if not (isinstance(found, type) and _fits(choice, found)):
        raise ConfigError(f"{name!r} is no {choice}: {WANTED[choice][1]}")
    return found


def _kind(path: str) -> str:
    """The dataset that reads such a file, most likely."""
    ends = {".npz": "npz", ".txt": "text", "": "folder"}
    return ends.get(os.path.splitext(path)[1].lower(), "csv")


def _fits(choice: str, cls: type) -> bool:
    base = WANTED[choice][0]
    if "." in base:
        found = find(base)
        return isinstance(found, type) and issubclass(cls, found)
    return dataclasses.is_dataclass(cls) and callable(getattr(cls, base, None))


def _named(value: Any) -> tuple[Any, Table]:
    if isinstance(value, dict):
        return value.get("name"), {k: v for k, v in value.items() if k != "name"}
    return value, {}


def _checked(cls: Callable[..., Any], table: Table, skip: set[str], where: str) -> Table:
    if not table:  # a class's first parser takes a tenth of a second
        return {}
    from jsonargparse import ArgumentError

    try:
        with ONE:
            checked = parser_for(cls, frozenset(skip)).parse_object(table, defaults=False)
    except ArgumentError as e:
        raise ConfigError(_in_words(str(e), where)) from e
    return {k: v for k, v in vars(checked).items() if k in table}


@lru_cache(maxsize=64)
def parser_for(cls: Callable[..., Any], skip: frozenset[str]) -> "ArgumentParser":
    """A jsonargparse parser for a class's options, but for those that are no matter of types alone."""
    from jsonargparse import ArgumentParser  # help does without it

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False, skip={*skip}, fail_untyped=False)
    return parser


def _in_words(message: str, where: str) -> str:
    # jsonargparse: 'Parser key "mu":\n  Expected a <class 'float'>. Got value: x'
    key, _, rest = message.partition(":")
    name = key.removeprefix("Parser key ").strip('" ')
    rest = " ".join(rest.split()).replace("<class '", "").replace("'>", "")
    rest = rest.replace("typing.", "")
    types = re.findall(r"Subtypes: \[(.*?)\] Errors:", rest)
    if types:
        value = rest.rpartition("Given value:")[2].strip() or "nothing"
        words = re.sub(r"Literal\[([^]]*)\]", lambda m: m[1].replace("'", ""), types[0])
        rest = f"expected {words.replace(', ', ' or ').replace('NoneType', 'null')}, got {value}"
    rest = f"{rest} nothing" if rest.endswith("Got value:") else rest
    rest = rest.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
    rest = re.sub(r"expected float, got ([+-]?(?:nan|inf))$", r"must be finite, got \1", rest)
    rest = re.sub(r"Literal\[([^]]*)\]", _choices, rest)
    return f"{where + '.' if where else ''}{name}: {rest}"


def _choices(found: re.Match[str]) -> str:
    return "one of " + found[1].replace("'", "")


def _literal(text: Any) -> Any:
    # free options are for a function found later; read numbers, booleans and lists as TOML or JSON would
    if not isinstance(text, str):
        return text
    words = {"null": None, "True": True, "False": False}
    if text in words:
        return words[text]
    for read_as in (lambda: tomllib.loads(f"v = {text}")["v"], lambda: json.loads(text)):
        with suppress(ValueError, RecursionError):
            return read_as()
    return float(text) if re.fullmatch(r"[+-]?(\d+\.|\.\d+)", text) else text


def _listed(options: Table) -> Table:
    """Numbers with commas between them, as betas, as a list."""
    numbers = re.compile(r"[\[(]?\s*[-+.\de]+(\s*,\s*[-+.\de]+)+\s*[\])]?")
    return {
        k: [_literal(part.strip()) for part in v.strip("[]() ").split(",")]
        if isinstance(v, str) and numbers.fullmatch(v)
        else v
        for k, v in options.items()
    }


def _parts(text: str) -> list[Any]:
    """A list as TOML or JSON writes it, or what stands between commas."""
    found = _literal(text.strip())
    if isinstance(found, list):
        return found
    return [part.strip(" '\"") for part in text.strip("[] ").split(",")]


def _table(name: str, value: Any) -> Table:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a table of options, got {str(value)[:60]!r}")
    return value
