"""Flags and TOML files -> one frozen config object, and back.

``--strategy fedprox --strategy.mu 0.1`` and ``[strategy] name = "fedprox", mu = 0.1`` are the same
nested table. A choice names one of a few classes or, by dotted path, a class of the user's own; its
options are that class's constructor arguments. jsonargparse checks and converts the values.
"""

import dataclasses
import inspect
import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from fedtorch.options import find
from fedtorch.run import trust
from fedtorch.run.names import CHOICES, FREE, WANTED
from fedtorch.types import ConfigError

LISTS = (list[str], list[int], tuple[str, ...])

Table = dict[str, Any]


def parse(cls: type, argv: Sequence[str], base: Table | None = None, own: bool = False) -> Any:
    """An instance of the config dataclass ``cls``; raises ConfigError naming what is wrong.

    Code that only a file names is imported where ``--trust-code`` is among the arguments, else refused;
    what ``base`` names too where it is the user's ``own``.
    """
    flags = from_flags(argv, {f.name: f.type for f in dataclasses.fields(cls)})
    path, trusted = flags.pop("config", None), trusts(flags)
    table = merge(merge(base or {}, read(path) if path else {}), flags)
    typed = merge(base or {}, flags) if own else flags
    if base or path:
        # a file that names no model gets the one of the same name as everybody: it may lie here
        trust.check(
            {"model": getattr(cls, "model", None)} | table,
            typed,
            "the run's config" if path is None else str(path),
            trusted,
        )
    return build(cls, table)


def trusts(flags: Table) -> bool:
    """Take ``--trust-code`` out of the flags; whether it was given."""
    given = str(flags.pop("trust_code", "false")).lower()
    if given not in ("true", "false"):
        raise ConfigError(f"{trust.FLAG} takes no value, but got {given!r}")
    return given == "true"


def resume(cls: type, argv: Sequence[str], config: Path, free: set[str]) -> Any:
    """Flags over a run's saved config, of which they may change the options in ``free`` alone."""
    if not config.is_file():
        raise ConfigError(f"nothing to resume: {config.parent} holds no run; leave out --resume")
    saved = read(config)
    own = trust.remembered(config)
    new = parse(
        cls, argv, base=saved, own=own
    )  # first: it refuses to import what only the file names
    old = build(cls, saved)
    for f in dataclasses.fields(cls):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if f.name not in free and before != after:
            raise ConfigError(
                f"the run in {config.parent} has {f.name} = {before!r}, not {after!r}; a resumed "
                "run keeps it (start a new run to change it)"
            )
    return new


def from_flags(argv: Sequence[str], fields: Mapping[str, Any]) -> Table:
    """``--a.b value``, ``--a.b=value`` and bare ``--switch`` -> a nested table."""
    table: Table = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}: options start with --")
        key, eq, value = word[2:].partition("=")
        key = key.replace("-", "_")
        top = key.partition(".")[0]
        if top not in fields and top not in ("config", "trust_code"):
            raise ConfigError(f"unknown option --{top}; fedtorch train --help lists them")
        if not eq:
            last = not words or words[0].startswith("--")
            if key == "trust_code" or (fields.get(key) is bool and last):
                value = "true"
            elif last:
                raise ConfigError(f"--{key} needs a value")
            else:
                value = words.pop(0)
        put(table, key.split("."), value)
    return table


def put(table: Table, keys: list[str], value: Any) -> None:
    """Set a nested key; a choice given both by name and by options becomes one table."""
    key, *rest = keys
    if rest:
        inner = table.get(key, {})
        table[key] = inner = inner if isinstance(inner, dict) else {"name": inner}
        put(inner, rest, value)
    elif isinstance(table.get(key), dict):
        table[key]["name"] = value
    else:
        table[key] = value


def read(path: str | Path) -> Table:
    """A TOML file as a table."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {e.strerror}") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise ConfigError(f"config file {str(path)!r} is not TOML: {e}") from e


def merge(under: Table, over: Table) -> Table:
    """``over`` wins; naming another choice drops the options of the one below."""
    result = dict(under)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(value, dict) and isinstance(below, (dict, str)):
            below = below if isinstance(below, dict) else {"name": below}
            same = "name" not in value or value["name"] == below.get("name")
            result[key] = merge(below, value) if same else value
        elif isinstance(below, dict) and not isinstance(value, dict):
            result[key] = below if below.get("name") == value else value
        else:
            result[key] = value
    return result


def build(cls: Callable[..., Any], table: Table, where: str = "") -> Any:
    """Call ``cls`` with a table of options; nested choices are built first."""
    args: Table = {}
    plain: Table = {}
    takes = inspect.signature(cls).parameters
    for key, given in table.items():
        full, value = f"{where}.{key}" if where else key, home(given)
        if key not in takes:
            known = ", ".join(takes) or "none"
            label = f"{where} {getattr(cls, '__name__', cls)}" if where else "the config"
            raise ConfigError(f"{label} has no option {key!r}; it has {known}")
        if full in CHOICES:
            args[key] = choose(full, value, takes[key].default)
        elif full in FREE:
            name, options = _named(value)
            if name is not None:
                args[key] = str(name)
            args[f"{key}_args"] = {k: _literal(home(v)) for k, v in options.items()}
        elif takes[key].annotation == dict[str, Any]:  # the parser would import a class named in it
            args[key] = _table(full, _literal(value))
        elif takes[key].annotation in LISTS and isinstance(value, str):
            plain[key] = value.strip("[] ").split(",")
        else:
            plain[key] = value
    skip = {k for k in takes if (f"{where}.{k}" if where else k) in CHOICES or k in FREE} | {*args}
    return cls(**_checked(cls, plain, skip, where), **args)


def home(value: Any) -> Any:
    """A path with the home folder in place of ``~``, which no shell expands in a file or after ``=``."""
    at_home = isinstance(value, str) and (value == "~" or value.startswith(("~/", "~\\")))
    return os.path.expanduser(value) if at_home else value


def choose(choice: str, value: Any, default: Any = None) -> Any:
    """``"fedprox"`` or ``{"name": "fedprox", "mu": 0.1}`` -> the object.

    Options without a name are those of the ``default``; where there is none, of the first choice.
    """
    name, options = _named(value)
    if name is None and dataclasses.is_dataclass(default) and not isinstance(default, type):
        return build(type(default), options, choice)
    if name is None:
        name = next(iter(CHOICES[choice]))
    if str(name).lower() in ("none", "null"):
        if options:
            given = ", ".join(f"{choice}.{k}" for k in options)
            raise ConfigError(f"{choice} is none, which has no {given}: leave out one or the other")
        return None
    return build(_class(choice, str(name)), options, choice)


def describe(obj: Any) -> Any:
    """The table that builds ``obj`` again: what goes into config.toml, logs and checkpoints."""
    if not dataclasses.is_dataclass(obj):
        return obj
    table = {f.name: getattr(obj, f.name) for f in dataclasses.fields(obj)}
    for key in FREE & table.keys():
        options = table.pop(f"{key}_args")
        table[key] = {"name": table[key], **options} if options else table[key]
    # TOML has no null: the word stands for it where leaving the option out would mean something else
    defaults = {f.name: f.default for f in dataclasses.fields(obj)}
    empty = {k for k, v in table.items() if v is None}
    kept = {k: "null" for k in empty if defaults.get(k) is not None}
    return {k: _entry(v) for k, v in table.items() if k not in empty} | kept


def flat(table: Table, prefix: str = "") -> Table:
    """``{"strategy": {"name": "fedprox", "mu": 0.1}}`` -> ``strategy`` and ``strategy.mu``."""
    found: Table = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= {prefix + key: value["name"]} if "name" in value else {}
            inner = {k: v for k, v in value.items() if k != "name"}
            found |= flat(inner, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def _entry(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    path = f"{type(value).__module__}.{type(value).__name__}"
    for names in CHOICES.values():
        for name, dotted in names.items():
            if find(dotted) is type(value):
                return {"name": name, **describe(value)}
    return {"name": path, **describe(value)}


def _class(choice: str, name: str) -> Callable[..., Any]:
    names = CHOICES[choice]
    if name.lower() in names:
        return find(names[name.lower()])  # type: ignore[no-any-return]
    if "." not in name and ":" not in name:
        raise ConfigError(
            f"unknown {choice} {name!r}; there are {', '.join(names)}, "
            "or give the dotted path of a class of your own"
        )
    found = find(name)
    if not (isinstance(found, type) and _fits(choice, found)):
        raise ConfigError(f"{name!r} is no {choice}: {WANTED[choice][1]}")
    return found


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
    parser = parser_for(cls, skip)
    try:
        checked = parser.parse_object(table, defaults=False)
    except ArgumentError as e:
        raise ConfigError(_plain(str(e), where)) from e
    return {k: v for k, v in vars(checked).items() if k in table}


def parser_for(cls: Callable[..., Any], skip: set[str]) -> ArgumentParser:
    """A jsonargparse parser for a class's options, with help from the attribute docstrings."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, as_group=False, skip=skip, fail_untyped=False)
    return parser


def _plain(message: str, where: str) -> str:
    # jsonargparse: 'Parser key "mu":\n  Expected a <class 'float'>. Got value: x'
    key, _, rest = message.partition(":")
    name = key.removeprefix("Parser key ").strip('" ')
    rest = " ".join(rest.split()).replace("<class '", "").replace("'>", "")
    types = re.findall(r"Subtypes: \[(.*?)\]", rest)
    if types:
        value = rest.rpartition("Given value: ")[2]
        rest = f"expected {types[0].replace(', ', ' or ').replace('NoneType', 'null')}, got {value}"
    rest = rest.replace("Expected a ", "expected ").replace(". Got value: ", ", got ")
    return f"{where + '.' if where else ''}{name}: {rest.replace('typing.', '')}"


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


def _table(name: str, value: Any) -> Table:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a table of options, got {str(value)[:60]!r}")
    return value
