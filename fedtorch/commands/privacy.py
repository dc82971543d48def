"""``fedtorch epsilon|noise|plan``: what a private run costs, without training."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtorch.commands.options import words_and_options
from fedtorch.types import ConfigError


@dataclass(frozen=True)
class Option:
    """One option of a command."""

    help: str
    default: Any = None
    kind: Callable[[str], Any] = float
    required: bool = False


DELTA = Option("chance that the guarantee fails; well below 1 / number of examples", 1e-5)
ACCOUNTANT = Option("prv (tight) or rdp (looser, as in older papers)", "prv", str)
RATE = Option("chance of each example (or client) to be in a step; 1: all are in every step", 1.0)
NOISE = Option("standard deviation of the noise over the clip norm", required=True)
STEPS = Option("noised steps of the whole run, e.g. rounds x local steps", kind=int, required=True)
FIGURES_NOISE = Option("noise multiplier of each of those, as privacy.json has it", 0.0)
JSON = Option("print one JSON object", False, bool)

RELATION = "neighbouring runs: one example (or client) added or removed"


def epsilon(argv: Sequence[str]) -> int:
    """Epsilon of a run with given noise."""
    options = {
        "noise-multiplier": NOISE,
        "sample-rate": RATE,
        "steps": STEPS,
        "delta": DELTA,
        "accountant": ACCOUNTANT,
        "figures": Option(
            "releases of figures inside the budget beside them (metrics_epsilon)", 0, int
        ),
        "figures-noise": FIGURES_NOISE,
        "curve": Option(
            "the whole claim: trade-off curve, replace-one, groups, membership", False, bool
        ),
        "group": Option("with --curve: examples (or clients) that are priced together", 2, int),
        "plot": Option("with --curve: draw it (PNG, PDF, SVG) or write its numbers (CSV)", "", str),
        "json": JSON,
    }
    given = read(argv, "epsilon", options)
    if given is None:
        return 0
    from fedtorch.privacy.accounting import events

    run = [
        events.Event("gaussian", given["noise-multiplier"], given["sample-rate"], given["steps"])
    ]
    together(given, "figures", "how many")
    if given["figures"]:
        run.append(events.Event("gaussian", given["figures-noise"], 1.0, given["figures"]))
    figures = {
        "epsilon": events.epsilon(run, given["delta"], given["accountant"]),
        "epsilon_rdp": events.epsilon(run, given["delta"], "rdp"),
        "noise_multiplier": given["noise-multiplier"],
    }
    if given["curve"]:
        from fedtorch.commands import curve

        whole = curve.figures(run, given)
        show(given, figures | whole if given["json"] else figures)
        curve.print_curve(whole, given)
    elif given["plot"]:
        raise ConfigError("--plot draws the curve: add --curve")
    else:
        show(given, figures)
    return 0


def noise(argv: Sequence[str]) -> int:
    """Noise of a run that may cost a given epsilon."""
    options = {
        "epsilon": Option("what the whole run may cost", required=True),
        "sample-rate": RATE,
        "steps": STEPS,
        "delta": DELTA,
        "accountant": ACCOUNTANT,
        "json": JSON,
    }
    given = read(argv, "noise", options)
    if given is None:
        return 0
    from fedtorch.privacy.accounting import events

    rate, steps, delta, accountant = (
        given[k] for k in ("sample-rate", "steps", "delta", "accountant")
    )
    found = events.calibrate(given["epsilon"], delta, rate, steps, accountant)
    run = [events.Event("gaussian", found, rate, steps)]
    show(
        given,
        {
            "noise_multiplier": found,
            "target_epsilon": given["epsilon"],
            "epsilon": events.epsilon(run, delta, accountant),
            "epsilon_rdp": events.epsilon(run, delta, "rdp"),
        },
    )
    return 0


def plan(argv: Sequence[str]) -> int:
    """Table of epsilon over rounds for several noises; a picture with ``--plot FILE``."""
    options = {
        "noise-multipliers": Option("noises to compare", [0.6, 0.8, 1.0, 1.5, 2.0, 4.0], numbers),
        "rounds": Option("rounds of the whole run", 100, int),
        "steps-per-round": Option("noised steps in a round", 1, int),
        "sample-rate": RATE,
        "delta": DELTA,
        "accountant": ACCOUNTANT,
        "figures-every": Option(
            "rounds from one release of figures inside the budget to the next (metrics_every)",
            0,
            int,
        ),
        "figures-noise": FIGURES_NOISE,
        "search": Option(
            "runs expected of a random search, of which the best is kept: its price", 0, int
        ),
        "plot": Option("draw the table into this PNG, PDF or SVG file", "", str),
        "json": JSON,
    }
    given = read(argv, "plan", options)
    if given is None:
        return 0
    together(given, "figures-every", "how often")
    from fedtorch.privacy.accounting import events

    if given["search"]:
        return searched(given)
    rounds = spread(given["rounds"])
    curves = events.over_rounds(
        given["noise-multipliers"],
        rounds,
        given["steps-per-round"],
        given["sample-rate"],
        given["delta"],
        given["accountant"],
        (given["figures-every"], given["figures-noise"]) if given["figures-every"] else None,
    )
    if given["plot"]:
        draw(given["plot"], rounds, curves, given)
    if given["json"]:
        table = [{"noise_multiplier": z, "epsilon": finite(e)} for z, e in curves.items()]
        shared = {
            k.replace("-", "_"): given[k]
            for k in ("delta", "accountant", "sample-rate", "steps-per-round")
        }
        print(json.dumps({"rounds": rounds, "curves": table, **shared}))
        return 0
    print(f"epsilon at delta {given['delta']:g} ({given['accountant']}), {RELATION}")
    print("rounds " + "".join(f"{f'noise {z:g}':>12}" for z in curves))
    for i, r in enumerate(rounds):
        print(f"{r:>6} " + "".join(f"{upwards(e[i]):>12}" for e in curves.values()))
    return 0


def together(given: dict[str, Any], option: str, what: str) -> None:
    """Refuse releases of figures without their noise, and noise without them."""
    if bool(given[option]) != bool(given["figures-noise"]):
        raise ConfigError(
            f"--{option} and --figures-noise belong together: {what}, and their noise"
        )
    if option == "figures-every" and given[option] and given["search"]:
        raise ConfigError(
            "--figures-every is of one run's table: leave it out, or leave out --search"
        )


def searched(given: dict[str, Any]) -> int:
    """What a search over settings costs, for each noise of a run, by how the number of runs is drawn."""
    from fedtorch.privacy.accounting.events import Event, epsilon
    from fedtorch.privacy.accounting.search import PoissonTrials, Trials, search_epsilon

    mean, delta, steps = given["search"], given["delta"], given["rounds"] * given["steps-per-round"]
    if given["plot"]:
        raise ConfigError("--plot draws epsilon over rounds: leave it out, or leave out --search")
    kinds = {
        "geometric": Trials(mean),
        "logarithmic": Trials(mean, 0.0),
        "poisson": PoissonTrials(mean),
    }
    table = []
    for z in given["noise-multipliers"]:
        one = Event("gaussian", z, given["sample-rate"], steps)
        costs = {
            "one_run": epsilon([one], delta, given["accountant"]),
            **{name: search_epsilon([one], t, delta) for name, t in kinds.items()},
            "all_charged": epsilon([one] * mean, delta, given["accountant"]),
        }
        table.append({"noise_multiplier": z, **{k: finite(v) for k, v in costs.items()}})
    if given["json"]:
        print(json.dumps({"runs_expected": mean, "delta": delta, "steps": steps, "search": table}))
        return 0
    print(
        f"epsilon of a search at delta {delta:g}: {mean} runs of {steps} steps expected, the best kept "
        f"({given['accountant']} for one and for all; rdp between), {RELATION}"
    )
    print("noise " + "".join(f"{k.replace('_', ' '):>13}" for k in costs))
    for row in table:
        shown = [upwards(math.inf if (v := row[k]) is None else v) for k in costs]
        print(f"{row['noise_multiplier']:<5g} " + "".join(f"{v:>13}" for v in shown))
    return 0


def read(argv: Sequence[str], command: str, options: dict[str, Option]) -> dict[str, Any] | None:
    """Values by option name; None after printing the help that was asked for."""
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(command, options))
        return None
    takes = {name: o.kind is not bool for name, o in options.items()}
    words, given = words_and_options(argv, command, takes)
    if words:
        raise ConfigError(f"fedtorch {command} takes no argument, but got {words[0]!r}")
    if missing := [n for n, o in options.items() if o.required and n not in given]:
        raise ConfigError(f"fedtorch {command} needs --{missing[0]} (fedtorch {command} --help)")
    return {n: parsed(n, o, given[n]) if n in given else o.default for n, o in options.items()}


def parsed(name: str, option: Option, text: str) -> Any:
    """One option's text as what it should be."""
    if option.kind is bool:
        return True
    try:
        return option.kind(text)
    except ValueError as e:
        kinds = {int: "a whole number", numbers: "numbers with commas between them"}
        kind = kinds.get(option.kind, "a number")
        raise ConfigError(f"--{name} must be {kind}, got {text!r}") from e


def numbers(text: str) -> list[float]:
    """``0.8,1,2`` as a list."""
    return [float(x) for x in text.split(",")]


def help_text(command: str, options: dict[str, Option]) -> str:
    """Usage, then one line for each option."""
    what = {"epsilon": epsilon, "noise": noise, "plan": plan}[command].__doc__ or ""
    lines = [f"usage: fedtorch {command} [options]", "", what, ""]
    for name, o in options.items():
        default = (
            ",".join(f"{x:g}" for x in o.default) if isinstance(o.default, list) else o.default
        )
        shown = (
            "" if o.kind is bool or default == "" else "(needed)" if o.required else f"({default})"
        )
        lines.append(f"  --{name:<18} {o.help} {shown}".rstrip())
    return "\n".join([*lines, "", f"{RELATION}."])


def show(given: dict[str, Any], figures: dict[str, Any]) -> None:
    """One run as text, or as JSON, where an infinite epsilon is null."""
    shared = {
        k: given[k.replace("_", "-")] for k in ("delta", "accountant", "sample_rate", "steps")
    }
    if given["json"]:
        print(json.dumps({k: finite(v) for k, v in figures.items()} | shared))
        return
    rdp = "" if given["accountant"] == "rdp" else f"; {upwards(figures['epsilon_rdp'])} by rdp"
    print(
        f"epsilon {upwards(figures['epsilon'])} at delta {given['delta']:g} ({given['accountant']}{rdp})\n"
        f"noise {upwards(figures['noise_multiplier'])} x clip norm, {given['steps']} steps, rate "
        f"{given['sample-rate']:g}\n{RELATION}"
    )


def draw(
    path: str, rounds: list[int], curves: dict[float, list[float]], given: dict[str, Any]
) -> None:
    """The table as a picture."""
    from fedtorch.tracking.drawings import epsilon_figure

    title = (
        f"delta {given['delta']:g}, rate {given['sample-rate']:g}, {given['accountant']} accountant"
    )
    try:
        epsilon_figure(rounds, curves, title).savefig(Path(path), dpi=150)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--plot {path}: cannot be drawn: {e}") from e


def spread(last: int, most: int = 10) -> list[int]:
    """About ten round numbers from 1 to ``last``."""
    if last < 1:
        raise ConfigError(f"--rounds must be a positive whole number, got {last}")
    return sorted({1, *(max(1, round(last * i / most)) for i in range(1, most + 1))})


def upwards(x: float) -> str:
    """Four places, upwards: what is printed still holds."""
    return f"{math.ceil(x * 1e4) / 1e4:.4f}" if math.isfinite(x) else "inf"


def finite(x: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(x, list):
        return [finite(v) for v in x]
    return None if isinstance(x, float) and math.isinf(x) else x
