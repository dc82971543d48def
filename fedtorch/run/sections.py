"""Sections of the report page: curves, clients by name, the test set, and privacy in words."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedtorch import disk
from fedtorch.rounds.history import CAME, LEFT_OUT, Scores, by_client, took_part
from fedtorch.rounds.judged import metrics_of
from fedtorch.run import compared
from fedtorch.run.charts import Cell, Curve, chart, scale, shaded, some_of
from fedtorch.run.markup import Markup, concatenated, table, tag, word
from fedtorch.run.report import plainly
from fedtorch.run.results import Saved

MOST = 100
"""Clients in a table or a map."""
COLUMNS = 60
"""Rounds in a map."""
MATRIX = 20
"""Classes up to which the matrix itself is shown."""
NOT_PRIVATE = "Not private: the guarantee does not cover this."


def number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# curves


def curves(run: Saved, other: Saved | None) -> Markup:
    """Losses, test figures and epsilon over rounds, the clients' range as a band."""
    drawn = [
        chart(title.replace("_", " "), _lines(names, run, other))
        for title, names in run.history.panels().items()
    ]
    return tag("div", *drawn, class_="charts") if drawn else Markup()


def _lines(names: Sequence[str], run: Saved, other: Saved | None) -> list[Curve]:
    found = []
    for name in names:
        low, high = run.history.band(name)
        label = _label(name)
        found.append(Curve(label, run.history.column(name), low, high, "all clients"))
        bare = name.removeprefix("nonprivate_")
        if other is not None:
            twins = [other.history.column(n) for n in (bare, f"nonprivate_{bare}")]
            found += [Curve(label, line, of=other.name) for line in twins]
    return found


def _label(name: str) -> str:
    words = {"privacy_epsilon": "spent, at most", "privacy_epsilon_planned": "planned"}
    words["privacy_epsilon_at_least"] = "at least, by the audit"
    words |= {f"noised_{k}": f"clients' {k}, noised, in the budget" for k in ("accuracy", "loss")}
    bare = name.removeprefix("nonprivate_")
    mark = " (not private)" if bare != name else ""
    return words.get(name, bare.replace("_", " ").replace("validation", "clients' own")) + mark


# clients


def client_maps(run: Saved) -> Markup:
    """Clients by rounds, for each figure of their validation data."""
    rounds = by_client(run.history)
    if not rounds:
        return Markup()
    steps = some_of([*rounds], COLUMNS)
    some = (
        f" {len(steps)} of {len(rounds)} rounds are shown, evenly."
        if len(steps) < len(rounds)
        else ""
    )
    said = "Each client's figure on its own validation data, the worst in the last round on top."
    last = [*rounds.values()][-1]
    maps = [_client_map(name, {r: rounds[r] for r in steps}, last) for name in metrics_of(last)]
    said = tag("p", said, some, f" {NOT_PRIVATE}" if run.private else "")
    return concatenated([said, tag("div", *maps, class_="side")])


def _client_map(name: str, rounds: Mapping[int, Scores], last: Scores) -> Markup:
    values = [s[name] for each in rounds.values() for s in each.values() if number(s.get(name))]
    if not values:
        return Markup()
    low, high = min(values), max(values)
    sign = -1 if compared.ends(name) == "high" else 1

    def worst(client: str) -> tuple[bool, float]:
        own = last[client].get(name)
        return not number(own), sign * own if own is not None and number(own) else 0.0

    shade = partial(_cell, low=low, high=high)
    order = sorted(last, key=worst)
    rows = [
        (
            i,
            [shade(each.get(i, {}).get(name)) for each in rounds.values()],
            [_short(last[i].get(name))],
        )
        for i in order[:MOST]
    ]
    shown = shaded("client", [str(r) for r in rounds], rows, ["last"])
    ends = scale(_short(low), _short(high))
    return tag("div", tag("h3", name.replace("_", " ")), shown, ends, more(len(order)))


def _cell(value: Any, low: float, high: float) -> Cell:
    if not number(value):
        return "na", "none"
    return (value - low) / (high - low or 1), _short(value)


def _short(value: Any) -> str:
    if not number(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def more(n: int) -> Markup:
    """How many clients a table of ``MOST`` leaves out."""
    return tag("p", f"{n - MOST} clients more are not shown.") if n > MOST else Markup()


CELL_KINDS = (
    ("na", "not asked"), ("h8", "reported"), ("bad", "did not report, or of no use"),
    ("out", "left out by the rule"),
)  # fmt: skip
"""What a client did in a round: how a cell looks, and what it says."""


def participation(run: Saved) -> Markup:
    """Clients by rounds: who reported, who did not."""
    rounds = took_part(run.history)
    sites = run.options.get("sites")
    known = [str(s) for s in sites] if isinstance(sites, list) else []
    names = sorted({*known, *(i for here in rounds.values() for i in here)}, key=_natural)
    if not names:
        return Markup()
    came = {i: sum(here.get(i) == CAME for here in rounds.values()) for i in names}
    if all(n == len(rounds) for n in came.values()):
        who = f"All {len(names)} clients" if len(names) > 1 else "The client"
        return tag("p", f"{who} reported in every round.")
    steps = some_of([*rounds], COLUMNS)
    rows = [
        (i, [CELL_KINDS[rounds[r].get(i, 0)] for r in steps], [str(came[i])]) for i in names[:MOST]
    ]
    left = any(LEFT_OUT in here.values() for here in rounds.values())
    key = [tag("span", tag("i", class_=f"key {k}"), w) for k, w in CELL_KINDS[: 4 if left else 3]]
    shown = shaded("client", [str(r) for r in steps], rows, ["reported"], quiet=True)
    said = tag("p", NOT_PRIVATE) if any("nonprivate_cohort" in m for m in run.history) else Markup()
    return concatenated([said, shown, tag("p", *key, class_="legend"), more(len(names))])


def lied(run: Saved) -> Markup:
    """Who was made to lie, in a simulation."""
    told = [m.get("liars", m.get("nonprivate_liars")) for m in run.history]
    who = sorted({str(i) for ids in told if isinstance(ids, list) for i in ids}, key=_natural)
    return tag("p", f"Made to lie: {', '.join(who[:MOST])}.") if who else Markup()


def cost(run: Saved) -> list[tuple[str, str]]:
    """Megabytes that were sent, and the clock of a pace."""
    found = []
    for name, label in (("bytes_up", "MB up"), ("bytes_down", "MB down")):
        for key, mark in ((name, ""), (f"nonprivate_{name}", " (not private)")):
            sizes = [m[key] for m in run.history if number(m.get(key))]
            found += [(label + mark, f"{sum(sizes) / 1e6:,.2f}")] if sizes else []
    clock = [m["simulated_seconds"] for m in run.history if number(m.get("simulated_seconds"))]
    return [*found, *([("seconds on the clock", f"{max(clock):,.0f}")] if clock else [])]


def _natural(name: str) -> tuple[bool, int, str]:
    """2 before 10, and numbers before words."""
    whole = name.isdecimal() and len(name) < 20
    return not whole, int(name) if whole else 0, name


def sites(run: Saved) -> Markup:
    """A line for each site of a federation."""
    rows = compared.of_sites(run)
    if not rows:
        return Markup()
    said = tag("p", NOT_PRIVATE) if run.private else Markup()
    return concatenated([said, table([*rows[0]], [[*row.values()] for row in rows])])


def _holders(run: Saved) -> dict[str, tuple[int, list[int]]]:
    """Client -> examples and those of each class, as far as the run kept it and it is what it should be."""
    each = run.shown.get("clients")
    found = {}
    for name, entry in each.items() if isinstance(each, dict) else ():
        if isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int:
            counts = entry[1] if isinstance(entry[1], list) else []
            found[name] = (entry[0], counts if all(type(n) is int for n in counts) else [])
    return found


def who_holds_what(run: Saved) -> Markup:
    """Clients' sizes and shares of classes."""
    found = _holders(run)
    if not found:
        return Markup()
    sizes = sorted(n for n, _ in found.values())
    classes = max(len(counts) for _, counts in found.values())
    names = run.shown.get("classes")
    named = isinstance(names, list) and len(names) >= classes
    heads = [str(n) for n in names] if named and names else [str(k) for k in range(classes)]
    whole = run.shown.get("clients_in_all", len(found))
    middle = sizes[len(sizes) // 2]
    said = [
        f"{whole} clients with {sizes[0]} to {sizes[-1]} training examples, {middle} in the middle. ",
        "Darker is a larger share of the client's examples." if classes else "",
        f" {NOT_PRIVATE}" if run.private else "",
    ]
    shown = [*found.items()][:MOST]
    rows = [
        (i, [(n / max(sum(c), 1), str(n)) for n in (*c, *[0] * (len(heads) - len(c)))], [str(size)])
        for i, (size, c) in shown
        if classes > 0 and len(heads) <= 40
    ]
    if rows:
        made = shaded("client", heads, rows, ["examples"])
    else:
        told = [[i, size, *([sum(n > 0 for n in c)] if classes else [])] for i, (size, c) in shown]
        made = table(["client", "examples", *(["classes"] if classes else [])], told)
    return concatenated([tag("p", *said), made, more(len(found))])


# the test set


def confusion(run: Saved) -> Markup:
    """What test examples are taken for."""
    found = compared.matrix(run)
    if found is None:
        return Markup()
    total = sum(map(sum, found.counts))
    right = sum(row[k] for k, row in enumerate(found.counts))
    said = tag("p", f"{right} of {total} test examples are taken for what they are.")
    if len(found.names) > MATRIX:
        worst = found.mistakes(15)
        return concatenated([said, table(["is", "is taken for", "times"], worst)])
    rows = [
        (
            name,
            [(n / max(sum(row), 1), str(n)) for n in row],
            [f"{row[k] / sum(row):.0%}" if sum(row) else "-"],
        )
        for k, (name, row) in enumerate(zip(found.names, found.counts, strict=True))
    ]
    key = tag(
        "p",
        "Rows are what an example is, columns what it is taken for; darker is a larger share of its row.",
    )
    return concatenated([said, shaded("is \\ taken for", found.names, rows, ["right"]), key])


# privacy


TOLD = (
    "mechanism", "trusted", "neighbouring", "noise_multiplier", "epsilon_planned", "epsilon_replace_one",
    "gaussian_mu", "true_positives_at_1_percent_false_ones_at_most", "membership_advantage_at_most",
    "rounds_planned",
    "rounds_charged", "released_before_round_0", "figures_inside_the_budget", "accountant", "randomness",
    "outside_the_guarantee",
)  # fmt: skip
"""Of ``privacy.json``."""


def privacy(run: Saved) -> Markup:
    """At most, at least, and what the claim rests on."""
    told = from_json(run.folder / "privacy.json")
    spent = told.get("epsilon_spent", run.result()["epsilon"])
    if not run.private:
        none = "None: nothing is noised, and whoever sees the model may learn of single examples."
        return tag("p", none) if run.options else Markup()
    if not number(spent):
        return tag("p", "A plan is set (see the options), and nothing is known to be spent yet.")
    unit = str(told.get("unit", "whoever the plan hides"))
    delta = told.get("delta", run.options.get("privacy.delta", 0.0))
    delta = float(delta) if number(delta) else 0.0
    seen = "all this run releases" + ("" if run.strict else " but what is marked not private")
    lines = [
        tag("p", tag("b", f"At most: epsilon {spent:.4g} at delta {delta:g}"),
            f", for {unit}. In plain words: {plainly(float(spent), seen, unit, delta)}.")
    ]  # fmt: skip
    lines += [tag("p", line) for line in _wider(told)]
    if audit := _audited(told):
        lines.append(audit)
    rows = [
        [k.replace("_", " "), word(told[k])]
        for k in TOLD
        if isinstance(told.get(k), str | int | float)
    ]
    return concatenated([*lines, table((), rows, "options")])


def _wider(told: Mapping[str, Any]) -> list[str]:
    """A sentence each: of a search that the run is the best of, and of a person with several examples."""
    tables = [told.get(k) for k in ("search", "user_level")]
    search, person = (t if isinstance(t, dict) else {} for t in tables)
    lines = []
    if number(alone := search.get("epsilon_of_the_released_run_alone")):
        lines.append(
            f"That is what a whole search costs, {search.get('runs_expected')} runs expected, of which "
            f"this one is the best and the only one released; alone it would be {alone:.4g}."
        )
    if number(whole := person.get("epsilon")):
        most = next((v for k, v in person.items() if k.endswith("_at_most")), None)
        lines.append(
            f"For a person with up to {most}: epsilon {whole:.4g} ({person.get('which_is')})."
        )
    return lines


def _audited(told: Mapping[str, Any]) -> Markup:
    """What an audit of the run found, where there was one: ``audit`` of ``privacy.json``."""
    audit = told.get("audit")
    least = audit.get("epsilon_at_least") if isinstance(audit, dict) else None
    if not isinstance(audit, dict) or not number(least):
        return Markup()
    sure, canaries = audit.get("confidence"), audit.get("canaries")
    parts = [f"{sure:.0%} sure" if number(sure) else "", str(audit.get("attacker", ""))]
    parts.insert(1, f"{canaries:,} canaries" if number(canaries) else "")
    how = ", ".join(filter(None, parts))
    why = audit.get("contradictions")
    found = why if isinstance(why, list) else []
    bound = tag("p", tag("b", f"At least: epsilon {least:.4g}"), f", an audit in this run ({how}).")
    refuted = [tag("p", f"The claim is refuted: {w}.", class_="note") for w in found]
    nothing = "It found nothing that contradicts the claim; a bound below it proves nothing."
    return concatenated([bound, *(refuted or [tag("p", nothing)])])


def from_json(path: Path) -> dict[str, Any]:
    """A JSON file's table; nothing where it is not there or is damaged, of which ``SHA256SUMS`` tell."""
    try:
        table = json.loads(disk.regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
