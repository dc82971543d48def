"""Flags and TOML files -> one frozen config object; ``objects.py`` builds it.

``--strategy fedprox --strategy.mu 0.1`` and ``[strategy] name = "fedprox", mu = 0.1`` are the same
nested table.
"""

import dataclasses
import difflib
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.options import find, near
from fedtorch.run import trust
from fedtorch.run.names import ALIASES, CHOICES, flag, ours
from fedtorch.run.objects import Table, construct, describe
from fedtorch.types import ConfigError

PLACES = ("path", "test")
"""Options of a dataset that say where its files lie."""


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
    return construct(cls, table)


def trusts(flags: Table) -> bool:
    """Take ``--trust-code`` out of the flags; whether it was given."""
    given = str(flags.pop("trust_code", "false")).lower()
    if given not in ("true", "false"):
        raise ConfigError(f"{trust.FLAG} takes no value, but got {given!r}")
    return given == "true"


def resumed_config(cls: type, argv: Sequence[str], config: Path, free: set[str]) -> Any:
    """Flags over a run's saved config, of which they may change the options in ``free`` alone.

    And where the data lie: that they are the same is known by their contents.
    """
    if not config.is_file():
        raise ConfigError(f"nothing to resume: {config.parent} holds no run; leave out --resume")
    saved = read(config)
    own = trust.remembered(config)
    # first: it refuses to import what only the file names
    new = parse(cls, argv, base=saved, own=own)
    old = construct(cls, saved)
    for f in dataclasses.fields(cls):
        was, now = getattr(old, f.name), getattr(new, f.name)
        if f.name == "dataset":
            now = _where(was, now)
        if f.name not in free and was != now:
            before, after = (flat({f.name: describe(c).get(f.name, "none")}) for c in (old, new))
            name = next(k for k in before | after if before.get(k) != after.get(k))
            raise ConfigError(
                f"the run in {config.parent} has {name} = {before.get(name)}, not {after.get(name)}; a "
                "resumed run keeps it (start a new run to change it)"
            )
    return new


def _where(was: Any, now: Any) -> Any:
    """The dataset ``now``, lying where it ``was``."""
    if type(was) is not type(now) or not dataclasses.is_dataclass(was):
        return now
    places = {n: getattr(was, n) for n in PLACES if hasattr(was, n)}
    return dataclasses.replace(now, **places)


def renamed(argv: Sequence[str], cls: type) -> list[str]:
    """Flags that others use, as the config dataclass ``cls`` has them; each is said once."""
    fields = {f.name for f in dataclasses.fields(cls)}
    words, swept = [], False
    for word in argv:
        dashed, name, rest = re.fullmatch(r"(--|)([^=]*)(.*)", word, re.DOTALL).groups()  # type: ignore[union-attr]
        key = name.replace("-", "_")
        ours = ALIASES.get(key, "")
        swept = name == "sweep" if dashed else swept
        if key not in fields and ours.partition(".")[0] in fields and (dashed or (swept and rest)):
            print(f"note: {dashed}{name} is {flag(ours)[2 - len(dashed) :]} here", file=sys.stderr)
            word = f"{dashed}{ours}{rest}"
        words.append(word)
    return words


def from_flags(argv: Sequence[str], fields: Mapping[str, Any]) -> Table:
    """``--a.b value``, ``--a.b=value`` and bare ``--switch`` -> a nested table; the last of two counts."""
    table: Table = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(
                f"unexpected argument {word!r}: options start with --{_meant(word, fields)}"
            )
        typed, eq, value = word.partition("=")
        key = typed[2:].replace("-", "_")
        top = key.partition(".")[0]
        if top not in fields and top not in ("config", "trust_code"):
            raise ConfigError(f"unknown option {typed}{_instead(key, fields)}")
        if not eq:
            last = not words or words[0].startswith("--")
            if key == "trust_code" or (last and _switch(key, fields)):
                value = "true"
            elif last:
                raise ConfigError(f"{typed} needs a value")
            else:
                value = words.pop(0)
        put(table, key.split("."), value)
    return table


def _instead(key: str, fields: Mapping[str, Any]) -> str:
    """What may be meant by an option that there is not, in words."""
    top, _, below = key.partition("_")
    if top == "no" and below in fields:
        return f"; write {flag(below)} false, or none"
    if top in CHOICES and top in fields:
        return f"; did you mean {flag(f'{top}.{below}')}?"
    names = {flag(name)[2:]: flag(name) for name in fields}
    found = near(key, names)
    for name in sorted(names, key=len, reverse=True):
        found = re.sub(rf"(mean|or) {name}(?= or|\?)", rf"\1 --{name}", found)
    found = _elsewhere(key.partition(".")[0]) + found
    return found or _meant(key, fields) or _called(key, fields) or "; --help lists them"


def _called(key: str, fields: Mapping[str, Any]) -> str:
    """The option of which what others call it was likely meant, in words."""
    others = [k for k, ours in ALIASES.items() if ours.partition(".")[0] in fields]
    meant = difflib.get_close_matches(key, others, 1, cutoff=0.8)
    return f"; did you mean {flag(ALIASES[meant[0]])}?" if meant else ""


def _elsewhere(key: str) -> str:
    """Which command has an option that this one has not, in words."""
    from fedtorch.run import help  # what it reads takes its time

    run, site = {*chain(*help.RUN_TOPICS.values())}, {*chain(*help.SITE.values())}
    if key in site - run:
        return "; fedtorch site has it"
    return (
        f"; fedtorch {'serve' if key in help.RUN_TOPICS['sites'] else 'train'} has it"
        if key in run
        else ""
    )


def help_asked(argv: Sequence[str]) -> list[str] | None:
    """The words behind ``--help``; None where it is not there."""
    at = next((i for i, word in enumerate(argv) if word in ("--help", "-h")), None)
    return None if at is None else list(argv[at + 1 :])


def _switch(key: str, fields: Mapping[str, Any]) -> bool:
    """Whether an option without a value is turned on by it."""
    choice, _, name = key.rpartition(".")
    if "on" in CHOICES.get(key, {}):
        return True
    if not choice:
        return fields.get(key) is bool
    classes = [find(path) for path in CHOICES.get(choice, {}).values()]
    return any(f.type is bool for c in classes for f in dataclasses.fields(c) if f.name == name)


def _meant(word: str, fields: Mapping[str, Any]) -> str:
    """What a word without -- may be, in words: an option, or the name of a choice."""
    word = word.lstrip("-\u2010\u2011\u2012\u2013\u2014\u2212")  # dashes of word processors
    name = word.replace("-", "_")
    if name in fields:
        return f"; did you mean {flag(name)}?"
    kind = FILES.get(Path(word).suffix.lower())
    if kind and "dataset" in fields:
        return f"; did you mean --dataset {kind} --dataset.path {word}?"
    choices = [
        c
        for c, names in CHOICES.items()
        if word.lower().replace("_", "-") in names and "." not in c
    ]
    choices = [c for c in choices if c in fields]
    if choices:
        return f"; did you mean {flag(choices[0])} {word}?"
    return f"; did you mean --config {word}?" if word.endswith(".toml") else ""


FILES = {".csv": "csv", ".tsv": "csv", ".parquet": "csv", ".npz": "npz"}
"""Which kind of data a file is, by the end of its name."""


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
        return tomllib.loads(disk.regular(Path(path)).read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"config file {str(path)!r} is not TOML: save it as UTF-8") from e
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(
            f"config file {str(path)!r} is not TOML: {e}; a line of it reads: rounds = 30"
        ) from e


def merge(under: Table, over: Table, where: str = "") -> Table:
    """``over`` wins; naming another choice drops the options of the one below.

    ``where``: the choice that these are options of, and a dot.
    """
    result = dict(under)
    for key, given in over.items():
        # one choice may go by several names
        value, below = (ours(where + key, v) for v in (given, result.get(key)))
        if isinstance(value, dict) and isinstance(below, (dict, str)):
            below = below if isinstance(below, dict) else {"name": below}
            same = "name" not in value or value["name"] == below.get("name")
            result[key] = merge(below, value, f"{where}{key}.") if same else value
        elif isinstance(below, list) and isinstance(value, dict) and "name" not in value:
            raise ConfigError(
                f"{key}.{next(iter(value), '')} is given beside a list of {key}: give the whole list again"
            )
        elif isinstance(below, dict) and not isinstance(value, dict):
            result[key] = below if below.get("name") == value else value
        else:
            result[key] = value
    return result


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
