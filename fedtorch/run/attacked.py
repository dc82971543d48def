"""What attacks on a run leave in its folder: figures, a picture, and the same in TensorBoard.

They are made of the raw examples by their owner, and no guarantee covers them: files are for the owner
alone, figures of private runs are marked, and under ``strict`` they stay out of TensorBoard and reports.
"""

import json
import math
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fedtorch import disk
from fedtorch.privacy import Privacy
from fedtorch.privacy.run import mark
from fedtorch.run.markup import Markup, concatenated, table, tag
from fedtorch.run.results import Saved
from fedtorch.run.sections import NOT_PRIVATE
from fedtorch.tracking import TensorBoard, Tracking, drawings
from fedtorch.tracking.tags import tag_of
from fedtorch.types import ConfigError

if TYPE_CHECKING:  # an attack is read when there is one
    from fedtorch.attacks.gradient import Inverted, View
    from fedtorch.attacks.membership import Inferred

FOLDER = "attacks"
NAMES = ("gradient", "membership")
OWNERS = "made of the raw examples by their owner, for the owner: no privacy guarantee covers it"


def write(
    folder: Path, name: str, found: Mapping[str, Any], png: bytes, figures: Mapping[str, float],
    plan: Privacy, tracking: Tracking | None,
) -> Path:  # fmt: skip
    """Figures and picture of one attack into the run's folder; raises ConfigError where that cannot be.

    ``figures``: curves of TensorBoard, of one point each, by name. Returns the picture's path.
    """
    place = folder / FOLDER
    try:
        place.mkdir(exist_ok=True)
        with disk.whole(place / f"{name}.json", private=True) as file:
            file.write((json.dumps({"for_its_owner": OWNERS, **found}, indent=2) + "\n").encode())
        with disk.whole(place / f"{name}.png", private=True) as file:
            file.write(png)
        if isinstance(tracking, TensorBoard) and not plan.strict:
            _track(place / name, name, png, figures, plan, tracking)
    except OSError as e:
        raise ConfigError(f"{place} cannot be written: {disk.reason(e)}") from e
    return place / f"{name}.png"


def _track(
    folder: Path, name: str, png: bytes, figures: Mapping[str, float], plan: Privacy,
    tracking: TensorBoard,
) -> None:  # fmt: skip
    folder.mkdir(exist_ok=True)
    named = {f"attack_{k}": v for k, v in figures.items() if math.isfinite(v)}
    named = mark(plan, named) if plan.claims else named
    with closing(
        tracking.open(folder, 0)
    ) as tracker:  # cuts away what an earlier attack has written
        tracker.scalars({tag: v for k, v in named.items() if (tag := tag_of(k))}, 0)
        tracker.picture(f"{'nonprivate' if plan.claims else 'attack'}/{name}", png, 0)


def read(folder: Path, name: str) -> dict[str, Any]:
    """What an attack on a run has left; nothing where there was none, or what it left is damaged."""
    try:
        table = json.loads(disk.regular(folder / FOLDER / f"{name}.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


# gradient inversion


def gradient_picture(found: "Inverted") -> bytes:
    """True examples above, what each party could make of what it sees below."""

    def shown(examples: Tensor) -> Tensor:
        return _cells((examples.double() - found.low) / (found.high - found.low))

    rows = [("held by clients (true examples)", shown(found.held), [""] * len(found.held))]
    rows += [
        (_named(v), shown(v.found), [f"{n:.0f} dB" for n in v.near.tolist()]) for v in found.views
    ]
    return drawings.image_rows(
        rows, f"Gradient inversion ({found.way}); for the data's owner alone"
    )


def _named(view: "View") -> str:
    return f"{view.name}{' (this run)' if view.own else ''}: {view.who}"


def _cells(examples: Tensor) -> Tensor:
    """Examples [N, ...] as pictures [N, 1 or 3, rows, columns]; of rows of a table a cell a column."""
    if examples.dim() == 4 and examples.shape[1] in (1, 3):
        return examples
    flat = examples.flatten(1)
    side = math.ceil(math.sqrt(flat.shape[1]))
    filled = flat.new_zeros(len(flat), side * math.ceil(flat.shape[1] / side))
    filled[:, : flat.shape[1]] = flat
    return filled.view(len(flat), 1, -1, side)


def gradient_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each view, of its table."""
    return [
        {
            "seen": f"{name}{' (this run)' if v['this_run'] else ''}",
            "by": v["who_sees_what"],
            "median dB": f"{v['psnr_median']:.1f}",
            "above 20 dB": f"{v['above_20_decibels']} of {len(v['psnr'])}",
        }
        for name, v in found["views"].items()
    ]


# membership


def membership_picture(found: "Inferred") -> bytes:
    """True over false positive rates on logarithmic axes."""
    curves = {k: (r.false, r.true) for k, r in found.rates.items()}
    curves |= {f"{k}, this run's model": (r.false, r.true) for k, r in found.own.items()}
    return drawings.roc_figure(curves, f"Membership, {found.shadows} shadow models", 1e-3)


def membership_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A line for each attack, of its table."""
    lines = [
        (f"{k}, {found['shadows'] + 1} models in turn", v) for k, v in found["attacks"].items()
    ]
    lines += [(f"{k}, this run's model", v) for k, v in found["own_model"].items()]
    guess = {"tpr_at_1_percent_fpr": 0.01, "auc": 0.5, "balanced_accuracy": 0.5}
    return [
        {
            "attack": name,
            "members found at 1 % false alarms": f"{v['tpr_at_1_percent_fpr']:.3f}",
            "AUC": f"{v['auc']:.3f}",
            "balanced accuracy": f"{v['balanced_accuracy']:.3f}",
        }
        for name, v in [*lines, ("guessing", guess)]
    ]


# the report


ROWS = {"gradient": gradient_rows, "membership": membership_rows}


def section(run: Saved) -> Markup:
    """Tables of the attacks on a run, without any example; nothing where there was none."""
    parts = []
    for name, rows in ROWS.items():
        if found := read(run.folder, name):
            try:
                lines = rows(found)
            except (
                KeyError,
                TypeError,
                ValueError,
                AttributeError,
            ):  # damaged, or of another version
                continue
            heads = {"gradient": "Gradient inversion", "membership": "Membership"}
            parts += [tag("h3", heads[name]), table([*lines[0]], [[*r.values()] for r in lines])]
    if not parts:
        return Markup()
    said = "Made by the owner of the data, who has the true examples to hold the attacks to."
    return concatenated([tag("p", said, f" {NOT_PRIVATE}" if run.private else ""), *parts])
