"""What ``--help`` says: options by topic, a line each, and ``--help NAME`` with all that is below one."""

import dataclasses
import inspect
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from typing import Any

from docstring_parser import parse_from_object

from fedtorch.options import find, near
from fedtorch.run.names import ALIASES, CHOICES, FREE, default, flag, written
from fedtorch.types import ConfigError

Topics = Mapping[str, tuple[str, ...]]
"""Heading -> options; what a command has not is left out."""

RUN_TOPICS: Topics = {
    "sites": ("sites", "address", "credentials", "he_public", "insecure", "input_shape", "outputs",
              "kind", "language", "columns", "classes", "standardize", "statistics", "deadline", "minimum",
              "enough", "most_examples", "patience"),
    "data": ("dataset", "partition", "clients", "validation"),
    "model": ("model", "lora", "loss", "step", "eval_step"),
    "privacy": ("privacy", "audit"),
    "algorithm": ("strategy", "aggregator", "channel", "participation", "pace", "threat"),
    "training": ("rounds", "lr", "schedule", "epochs", "steps", "batch_size", "optimizer", "drop_last",
                 "accumulate", "clip_norm", "lr_warmup", "lr_decay", "lr_floor", "seed"),
    "judging": ("metrics", "eval_every", "evaluate", "stop_after", "monitor", "keep", "finetune_steps"),
    "run": ("run_dir", "resume", "checkpoint_every", "tracking", "engine", "threads"),
}  # fmt: skip
"""Options of ``train`` and ``serve``."""

SITE: Topics = {
    "site": ("server", "engine", "name", "dataset", "credentials", "he_secret", "insecure", "state",
             "lost_state", "patience", "device"),
    "limits": ("models", "steps", "require_secure", "peers", "least_peers", "max_epsilon", "max_delta",
               "max_parameters", "max_rounds", "max_epochs", "max_steps", "max_batch",
               "max_megabytes"),
}  # fmt: skip
"""Options of ``site``: what it is, and what its owner allows."""

COLUMN = 29
"""Letters before the text of an option."""


def help_text(cls: type, command: str, topics: Topics, asked: Sequence[str] = ()) -> str:
    """Options of the config dataclass ``cls`` by topic, a line each; or all about what is ``asked``.

    That is a topic, an option, a choice's name, a choice's option, or ``all``. Raises ConfigError naming
    what comes near where there is nothing of that name.
    """
    lines = [f"usage: {command} [--config run.toml] [--option value ...]", ""]
    known = {f.name: f for f in dataclasses.fields(cls)}
    topics = {t: tuple(n for n in names if n in known) for t, names in topics.items()}
    topics = {t: names for t, names in topics.items() if names}
    texts = _docs(cls)
    if not asked:
        lines += [
            "Flags override the TOML file. A choice has options: --strategy fedprox --strategy.mu 0.1",
            f"{command} --help NAME tells all of a topic or an option, --help all everything.",
            "Code that only a file names is imported with --trust-code alone.",
        ]
        for topic, names in topics.items():
            lines += ["", f"{topic}:"]
            lines += [_brief(flag(n), default(known[n]), _clause(known[n], texts)) for n in names]
        return "\n".join(lines)
    word = asked[0].lstrip("-").replace("-", "_")
    word = ALIASES.get(word, word)
    wanted = {"all": (*chain(*topics.values()),), **topics}.get(word, (word,))
    pages = [page for name in wanted if name in known for page in _page(known[name], texts)]
    pages = pages or [*_below(word, known)]
    if not pages:
        others = [*topics, *known, *(n for c in CHOICES if _of(c, known) for n in _names(c, known))]
        raise ConfigError(f"{command} has no {asked[0]!r} to tell about{near(word, others)}")
    return "\n".join([*lines, *pages])


def _page(f: "dataclasses.Field[Any]", texts: Mapping[str, str]) -> Iterator[str]:
    """An option, then each of its choices with what that takes, then choices within choices."""
    yield f"  {flag(f.name)} {written(default(f))}".rstrip()
    yield from _wrapped(texts.get(f.name, ""), 6)
    for choice in (c for c in CHOICES if _of(c, [f.name])):
        if "." in choice:
            yield f"\n  {flag(choice)}"
        yield from _choice(choice, _names(choice, {f.name: f}))
    yield ""


def _choice(choice: str, names: Mapping[str, str]) -> Iterator[str]:
    """Options that all of a choice's ``names`` have, once, then each name with its own."""
    classes = {name: find(path) for name, path in names.items()}
    options = {name: _options(choice, cls) for name, cls in classes.items()}
    counted = Counter(o for own in options.values() for o in own)
    common = [o for o, times in counted.items() if times > max(1, len(options) / 2)]
    if common:
        yield "    all of these, but where one says otherwise:"
        yield from (_line(*o) for o in common)
    for name, cls in classes.items():
        yield from _wrapped(f"{name}: {_about(cls)}", 4, 8)
        yield from (_line(*o) for o in options[name] if o not in common)


def _options(choice: str, cls: type) -> list[tuple[str, str, str]]:
    """Flag, default and text of each option of a class, but for choices within it."""
    texts = _docs(cls)
    own = [f for f in dataclasses.fields(cls) if f"{choice}.{f.name}" not in CHOICES]
    return [(flag(f"{choice}.{f.name}"), written(default(f)), texts.get(f.name, "")) for f in own]


def _below(word: str, known: Mapping[str, Any]) -> Iterator[str]:
    """A name of a choice with its options, and options of choices that have this name."""
    name = word.lstrip("-").replace("-", "_")
    for choice in (c for c in CHOICES if _of(c, known)):
        if choice in (name, ALIASES.get(name)):
            yield f"  {flag(choice)}"
            yield from _choice(choice, _names(choice, known))
        for short, path in _names(choice, known).items():
            options = _options(choice, find(path))
            last = [o for o in options if name in (f"{choice}.{o[0].rpartition('.')[2]}".replace("-", "_"),
                                                   o[0].rpartition(".")[2].replace("-", "_"))]  # fmt: skip
            if last or word.replace("_", "-") in (short, f"{choice}.{short}"):
                yield from _wrapped(f"{flag(choice)} {short}: {_about(find(path))}", 2, 6)
                yield from (_line(*o) for o in last or options)


def _of(choice: str, names: Any) -> bool:
    return choice.partition(".")[0] in names and choice not in FREE


def _names(choice: str, known: Mapping[str, "dataclasses.Field[Any]"]) -> dict[str, str]:
    """What a choice may be: all its names, but where its option's field says that a command takes few."""
    few = known[choice.partition(".")[0]].metadata.get("names", CHOICES[choice])
    return {n: path for n, path in CHOICES[choice].items() if n in few}


def _clause(f: "dataclasses.Field[Any]", texts: Mapping[str, str]) -> str:
    """The first clause of an option's text, and the names that it may be."""
    first = re.split(r"[:;.] |[.:]$", texts.get(f.name, ""), maxsplit=1)[0]
    names = _names(f.name, {f.name: f}) if f.name in CHOICES else {}
    return f"{first}: {', '.join(names)}" if len(names) > 1 else first


def _brief(name: str, usual: Any, text: str) -> str:
    """An option with its default and as much of the text as its line has room for."""
    head = f"  {name} {written(usual)}".rstrip()
    return f"{head:<{COLUMN}}" + textwrap.shorten(text, _width() - COLUMN, placeholder=" ...")


def _line(name: str, usual: str, text: str) -> str:
    """An option of a choice with its default, then its text beside it, below it where that is long."""
    head, start = f"      {name} {usual}".rstrip(), " " * (COLUMN + 6)
    lines = textwrap.wrap(text, _width(), initial_indent=start, subsequent_indent=start)
    if lines and len(head) < len(start) - 1:
        return "\n".join([head + lines[0][len(head) :], *lines[1:]])
    return "\n".join([head, *lines])


def _about(cls: type) -> str:
    """The first paragraph of a class's docstring in one line."""
    return _plain((inspect.getdoc(cls) or "").partition("\n\n")[0])


def _plain(text: str) -> str:
    """A docstring's words in one line, without its marks of code."""
    return " ".join(text.replace("``", "").split())


def _wrapped(text: str, indent: int, hanging: int | None = None) -> list[str]:
    more = " " * (indent if hanging is None else hanging)
    return textwrap.wrap(text, _width(), initial_indent=" " * indent, subsequent_indent=more)


def _width() -> int:
    return max(60, min(100, shutil.get_terminal_size().columns))


def _docs(cls: type) -> dict[str, str]:
    return {name: text for base in cls.__mro__[-2::-1] for name, text in _own_docs(base)}


@cache
def _own_docs(cls: type) -> list[tuple[str, str]]:
    """Name and text of what a class itself documents, which is read from its source."""
    return [(p.arg_name, _plain(p.description or "")) for p in parse_from_object(cls).params]
