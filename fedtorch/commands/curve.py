"""``fedtorch epsilon --curve``: what a claim means beyond (epsilon, delta)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtorch.commands.privacy import finite, upwards
from fedtorch.privacy.accounting import claims
from fedtorch.privacy.accounting.events import Event
from fedtorch.types import ConfigError


def figures(run: Sequence[Event], given: dict[str, Any]) -> dict[str, Any]:
    """All of it as a table; draws it where that is asked for."""
    if given["group"] < 1:
        raise ConfigError(f"--group must be a positive whole number, got {given['group']}")
    delta, accountant, k = given["delta"], given["accountant"], given["group"]
    curve = claims.curve(run, delta, accountant)
    if given["plot"]:
        _draw(given["plot"], curve, f"noise {given['noise-multiplier']:g}, {given['steps']} steps")

    def cost(units: int) -> float:
        return claims.epsilon_of([(e, units) for e in run], delta, accountant)

    return {
        "gaussian_mu": finite(curve.mu) if curve.exact else None,
        "epsilon_replace_one": finite(cost(claims.REPLACED)),
        f"epsilon_of_a_group_of_{k}": finite(cost(k)),
        "membership_advantage": curve.advantage,
        "trade_off_curve": [
            {"false_positive_rate": a, "true_positive_rate": 1 - b} for a, b in curve.points
        ],
    }


def print_curve(found: dict[str, Any], given: dict[str, Any]) -> None:
    """The same as lines, unless JSON was asked for."""
    if given["json"]:
        return
    k, mu = given["group"], found["gaussian_mu"]
    words: dict[float | None, str] = {None: "inf"}
    words |= {v: upwards(v) for v in found.values() if isinstance(v, float)}
    print(f"Gaussian: mu {upwards(mu)}" if mu is not None else "not a Gaussian curve: points of it")
    print(
        f"epsilon {words[found['epsilon_replace_one']]} if one is replaced, "
        f"{words[found[f'epsilon_of_a_group_of_{k}']]} for {k} together\n"
        f"membership: advantage at most {upwards(found['membership_advantage'])}\n"
        "false positive rate   true positive rate at most"
    )
    for point in found["trade_off_curve"]:
        rate = upwards(point["true_positive_rate"])
        print(f"{point['false_positive_rate']:>19g}   {rate:>26}")
    if given["plot"]:
        print(f"curve: {given['plot']}")


def _draw(path: str, curve: claims.Curve, title: str) -> None:
    """The curve as a picture, or as numbers."""
    from fedtorch.tracking.drawings import trade_off_figure

    alarms = np.concatenate([np.geomspace(1e-5, 0.01, 50)[:-1], np.linspace(0.01, 1, 100)])
    points = [(float(a), curve.found(float(a))) for a in alarms]
    try:
        if path.endswith(".csv"):
            rows = "".join(f"{a:.6g},{b:.6g}\n" for a, b in points)
            Path(path).write_text("false_positive_rate,true_positive_rate_at_most\n" + rows)
        else:
            trade_off_figure(points, title).savefig(Path(path), dpi=150)
    except (OSError, ValueError) as e:
        raise ConfigError(f"--plot {path}: cannot be drawn: {e}") from e
