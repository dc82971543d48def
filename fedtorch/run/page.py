"""``report.html``: what came of a run on one page, made of the files in its folder alone.

Names of clients and classes, options and files are anybody's words: all are escaped (``markup``), and the
page forbids scripts and the network to whoever opens it. What a run has not is not shown.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.run import attacked, compared, prices, sections
from fedtorch.run.markup import Markup, concatenated, table, tag, word
from fedtorch.run.results import Saved
from fedtorch.run.style import HEAD, MADE
from fedtorch.types import ConfigError

NAME = "report.html"
Section = tuple[str, Markup]
"""Heading and what stands below it."""


def write(run: Saved, other: Saved | None = None, output: Path | None = None) -> Path:
    """The page into the run's folder, or another place; raises ConfigError where that cannot be."""
    path = run.folder / NAME if output is None else output
    path = path / NAME if path.is_dir() else path
    try:
        if path.exists() and MADE.encode() not in disk.regular(path).read_bytes()[:500]:
            raise ConfigError(
                f"{path} is there, and no report of a run: give --output another name"
            )
        with disk.whole(path) as file:
            file.write(page(run, other).encode())
    except OSError as e:
        raise ConfigError(
            f"{path} cannot be written ({e.strerror}): give --output a file in a folder that is there"
        ) from e
    return path


def page(run: Saved, other: Saved | None = None) -> str:
    """The whole page."""
    body = [_top(run), *(tag("p", note, class_="note") for note in _notes(run, other))]
    for heading, inside in parts_of(run, other):
        if inside:
            body.append(tag("section", tag("h2", heading), inside))
    foot = f"Made by fedtorch report from {run.folder}. The page needs no network."
    inside = tag("main", *body, tag("footer", foot))
    return f"<!doctype html>\n{HEAD}{tag('title', f'{run.name}: fedtorch report')}\n{tag('body', inside)}\n"


def parts_of(run: Saved, other: Saved | None) -> Iterator[Section]:
    """All there may be, in their order."""
    strict = run.strict
    yield "Curves", sections.curves(run, other)
    yield "Privacy", sections.privacy(run)
    if not strict:
        yield "Attacks", attacked.section(run)
    if other is not None:
        yield f"Against {other.name}", _against(run, other)
    if not strict:
        yield "Clients, round by round", sections.client_maps(run)
    yield "Who took part", concatenated([sections.participation(run), sections.lied(run)])
    if not strict:
        yield "Sites", sections.sites(run)
        yield "Who holds what", sections.who_holds_what(run)
    yield "What is taken for what", sections.confusion(run)
    yield "Options", _options(run)
    yield "Versions", _versions(run)


def _unusual(options: Mapping[str, Any]) -> list[str]:
    """Rule, threat, channel and pace of a run that has others than most."""
    found = []
    for part in ("aggregator", "threat", "channel", "pace"):
        value = options.get(part)
        if isinstance(value, list):  # stages of a channel, in order
            value = " and ".join(str(v.get("name")) for v in value if isinstance(v, dict))
        found += [f"{part} {value}"] if value and value not in ("mean", "synchronous") else []
    return found


def _top(run: Saved) -> Markup:
    result, options = run.result(), run.options
    last = {
        k: v for k, v in result.items() if k.startswith("test_") and isinstance(v, (int, float))
    }
    order = sorted(last, key=lambda k: k == "test_loss")
    epsilon, seconds = result["epsilon"], result["seconds"]
    sites = options.get("sites")
    who = f"{len(sites)} sites" if isinstance(sites, list) else options.get("dataset")
    figures = [
        *((k.replace("_", " "), f"{last[k]:.4f}") for k in order[:4]),
        *([("epsilon, at most", word(float(epsilon)))] if sections.number(epsilon) else []),
        ("rounds", f"{run.rounds} of {run.planned}" if run.rounds != run.planned else run.rounds),
        *([("seconds of training", f"{seconds:,.1f}")] if sections.number(seconds) else []),
        *sections.cost(run),
    ]
    ended = run.summary.get("ended") if run.ended else ""
    state = {"round": "not at its end", "stopped": "stopped early"}.get(
        run.state().split()[0], run.state()
    )
    said = [who, options.get("model"), options.get("strategy"), *_unusual(options), state]
    line = ", ".join(str(w) for w in said if w)
    return tag(
        "header",
        tag("h1", run.name),
        tag("p", f"{line}{f' ({ended})' if ended else ''}."),
        tag("dl", *(tag("div", tag("dt", k), tag("dd", v)) for k, v in figures), class_="figures"),
    )


def _notes(run: Saved, other: Saved | None) -> list[str]:
    found = [f"Damaged or edited: {n}" for r in (run, other) if r for n in r.notes]
    if not run.history.last().get("round"):
        found.append("No round of this run is recorded: there are no figures to show.")
    if other is not None:
        found += prices.spent([*{r.folder.resolve(): r for r in (run, other)}.values()])
    return found


# another run, options, versions


def _against(run: Saved, other: Saved) -> Markup:
    found = compared.sides(run, other)
    heads = [run.name, other.name]
    results = [[k.replace("_", " "), *pair] for k, pair in found.results.items() if k != "run"]
    parts = [
        table(["result", *heads], results, "options"),
        tag("p", "The options are the same.") if not found.options else Markup(),
        table(
            ["option that differs", *heads],
            [[k, *map(_open, pair)] for k, pair in found.told().items()],
            "options",
        ),
    ]
    mark = " (not private)" if run.private or other.private else ""
    allowed = not run.strict and not other.strict
    for metric, pairs in found.clients.items() if allowed else ():
        rows = [[i, a, b, round(b - a, 4)] for i, (a, b) in [*pairs.items()][: sections.MOST]]
        parts.append(
            table([f"client, by {metric.replace('_', ' ')}{mark}", *heads, "difference"], rows)
        )
        parts.append(sections.more(len(pairs)))
    rows = [[k, a, b, round(b - a, 4)] for k, (a, b) in found.classes.items()][: sections.MOST]
    parts.append(table(["share right, by class", *heads, "difference"], rows))
    return tag("div", *parts, class_="side")


def _options(run: Saved) -> Markup:
    given = {k: _open(v) for k, v in run.options.items() if v not in ("", [], None)}
    pairs = [tag("div", tag("dt", k), tag("dd", v)) for k, v in given.items()]
    return tag("dl", *pairs, class_="pairs") if pairs else Markup()


def _open(value: Any) -> Any:
    """An option as anybody may read it: addresses without their password."""
    if isinstance(value, list):
        return ", ".join(str(_open(v)) for v in value)
    return re.sub(r"(://)[^/@\s]+@", r"\1...@", value) if isinstance(value, str) else word(value)


def _versions(run: Saved) -> Markup:
    about = sections.from_json(run.folder / "about.json")
    packages = about.get("packages")
    known = packages.items() if isinstance(packages, dict) else ()
    rows = [[k, v] for k, v in known if isinstance(v, str)]
    rows += [[k.replace("_", " "), about[k]] for k in ("python", "platform", "git_commit", "started")
             if isinstance(about.get(k), str)]  # fmt: skip
    return table((), rows, "options")
