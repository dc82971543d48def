"""Every scalar tag there is, with its unit and what it is for; docs/tensorboard.md is this table."""

from collections.abc import Mapping
from typing import NamedTuple

OVERVIEW = "_overview"
"""The group that stands first on every page: TensorBoard sorts a stroke before letters."""


class Tag(NamedTuple):
    """One curve."""

    tag: str
    unit: str
    purpose: str


TAGS: dict[str, Tag] = {
    "train_loss": Tag(
        "train/loss", "loss", "training loss over the visit, mean over clients by their weight"
    ),
    "lr": Tag("train/lr", "", "client learning rate after the schedule"),
    "step_norm": Tag(
        "train/step_norm", "L2 norm", "how far the global weights moved, after the server optimizer"
    ),
    "client_loss_min": Tag("clients/loss_min", "loss", "best client's training loss"),
    "client_loss_q1": Tag("clients/loss_q1", "loss", "first quartile over clients"),
    "client_loss_median": Tag("clients/loss_median", "loss", "median over clients"),
    "client_loss_q3": Tag("clients/loss_q3", "loss", "third quartile over clients"),
    "client_loss_max": Tag("clients/loss_max", "loss", "worst client's training loss"),
    "client_loss_worst10": Tag(
        "clients/loss_worst10", "loss", "mean of the worst tenth of clients (at least one)"
    ),
    "update_norm": Tag(
        "clients/update_norm", "L2 norm", "length of a client's update, mean by weight"
    ),
    "cosine_to_mean": Tag(
        "clients/cosine_to_mean",
        "0 to 1",
        "cosine of the client updates to their mean, averaged by weight x length; low is drift",
    ),
    "clients": Tag("clients/reported", "clients", "clients whose update was used"),
    "dropped": Tag("clients/dropped", "clients", "chosen clients that did not report back"),
    "nonfinite": Tag("clients/nonfinite", "clients", "clients left out: update not finite"),
    "examples": Tag("clients/examples", "examples", "training examples the reporting clients hold"),
    "staleness_mean": Tag(
        "clients/staleness_mean", "steps", "server steps since a visit was sent its model, mean"
    ),
    "staleness_max": Tag("clients/staleness_max", "steps", "the same of the oldest visit"),
    "visits_min": Tag(
        "clients/visits_min", "visits", "of the client that came least often so far, by the clock"
    ),
    "visits_median": Tag("clients/visits_median", "visits", "the same of the client in the middle"),
    "visits_max": Tag("clients/visits_max", "visits", "the same of the one that came most often"),
    "bytes_down": Tag(
        "traffic/bytes_down", "bytes", "to all chosen clients: model and strategy state"
    ),
    "bytes_up": Tag("traffic/bytes_up", "bytes", "from all reporting clients: their updates"),
    "clamped": Tag(
        "clients/clamped", "numbers", "under masks: numbers of updates beyond aggregator.range"
    ),
    "secure_client_seconds": Tag(
        "time/masks_client", "seconds", "what masks take of one client's processor, by formula"
    ),
    "secure_server_seconds": Tag(
        "time/masks_server", "seconds", "what masks take of one core of the server's, by formula"
    ),
    "simulated_seconds": Tag(
        "time/simulated",
        "seconds",
        "the clock of the pace: when the step's last visit arrived",
    ),
    "seconds_sample": Tag("time/sample", "seconds", "choosing the cohort, preparing the task"),
    "seconds_train": Tag("time/train", "seconds", "clients training, until the last one is in"),
    "seconds_aggregate": Tag("time/aggregate", "seconds", "the server's step"),
    "seconds_evaluate": Tag("time/evaluate", "seconds", "test and validation data"),
    "seconds_log": Tag("time/log", "seconds", "recording the round before this one"),
    "seconds_elapsed": Tag(
        "time/elapsed", "seconds", "since the run began; time it was stopped does not count"
    ),
    "clients_per_second": Tag("time/clients_per_second", "clients/s", "speed of training"),
    "examples_per_second": Tag(
        "time/examples_per_second", "examples/s", "speed of training, each pass counted"
    ),
    "privacy_epsilon": Tag("privacy/epsilon", "", "privacy spent so far, at the run's delta"),
    "privacy_epsilon_planned": Tag(
        "privacy/epsilon_planned", "", "privacy spent once all planned rounds are done"
    ),
    "privacy_epsilon_at_least": Tag(
        "privacy/epsilon_at_least",
        "",
        "what the audit's attack proves was spent at least, at 95 %; only the last one counts",
    ),
    "noised_accuracy": Tag(
        "noised/accuracy",
        "",
        "accuracy of the model as clients were sent it, on their training data: noised, inside the budget",
    ),
    "noised_loss": Tag("noised/loss", "loss", "the same of the loss, which is held to a range"),
    "noised_error": Tag("noised/error", "", "standard deviation of the noise on that accuracy"),
    "noised_count": Tag(
        "noised/count",
        "",
        "how many examples, or clients of a secret cohort, are behind it: noised",
    ),
    "privacy_noise_multiplier": Tag(
        "privacy/noise_multiplier", "", "noise standard deviation over clip norm"
    ),
    "privacy_noise_std": Tag(
        "privacy/noise_std", "parameter units", "standard deviation of the noise on what is clipped"
    ),
    "privacy_clip_norm": Tag(
        "privacy/clip_norm", "L2 norm", "longest contribution that is not scaled down"
    ),
}
"""Figure of a round -> its tag."""

FAMILIES = (
    *(
        "test",
        "validation",
        "shared",
        "finetuned",
        "privacy",
        "attack",
        "nonprivate",
        "site",
        "strategy",
    ),
    OVERVIEW,
)
"""A figure ``test_f1`` that has no line of its own becomes the tag ``test/f1``, and so on."""


def tag_of(figure: str) -> str | None:
    """The tag of a figure, or None for what is not drawn (the round's number, lists of ids)."""
    if figure in TAGS:
        return TAGS[figure].tag
    family, _, name = figure.partition("_")
    return f"{family}/{name}" if family in FAMILIES and name else None


Judged = tuple[str, str | None]
"""A metric's name, and which of its figures are bad: ``low``, ``high`` or, where nobody knows, None."""


def overview(values: Mapping[str, float], judged: Judged) -> dict[str, float]:
    """What one looks at first, of a round's values by tag: test, epsilon, worst client, seconds.

    Five curves at most: HParams ticks the first five tags that there are.
    """
    name, bad = judged
    end = {"low": "min", "high": "max"}.get(bad or "", "")
    found = {
        f"test_{name}": f"test/{name}",
        "test_loss": "test/loss",
        "epsilon": "privacy/epsilon",
        f"worst_client_{name}": f"validation/{name}_{end}",
        f"worst_client_{name}_not_private": f"nonprivate/validation_{name}_{end}",
        "seconds": "time/elapsed",
    }
    return {f"{OVERVIEW}/{k}": values[tag] for k, tag in found.items() if tag in values}


def purpose(tag: str) -> str:
    """One sentence on a curve, its unit first, for the sign beside its title; or nothing."""
    plain = tag.removeprefix("nonprivate/").removeprefix(f"{OVERVIEW}/")
    known = next((t for n, t in TAGS.items() if tag == t.tag or plain in (n, t.tag)), None)
    words = (
        f"{known.unit}: {known.purpose}" if known and known.unit else known.purpose if known else ""
    )
    if tag in ("privacy/epsilon", f"{OVERVIEW}/epsilon"):
        words = f"{TAGS['privacy_epsilon'].purpose}. {SMOOTHED}"
    return (
        words
        if tag == plain or not tag.startswith("nonprivate")
        else f"not private. {words}".strip()
    )


SMOOTHED = "Set smoothing to 0: a smoothed curve shows less epsilon than was spent."

Chart = tuple[str, list[str]]
"""Kind (``Multiline`` or ``Margin``: value, lower, upper) and tags, which may be patterns."""


def custom_scalars(private: bool) -> dict[str, dict[str, Chart]]:
    """Which curves stand together on the Custom Scalars page."""
    clients = "nonprivate/client" if private else "clients/"
    clients = clients + ("_" if private else "")
    one = "nonprivate/" if private else "clients/"
    train = "nonprivate/train_loss" if private else "train/loss"
    pages: dict[str, dict[str, Chart]] = {
        "Overview": {
            "Test metrics": ("Multiline", ["test/(?!loss)"]),
            "Loss: test, train": ("Multiline", ["test/loss", train]),
            "How far the model moves": ("Multiline", ["train/step_norm"]),
        },
        "Clients": {
            "Training loss: median, half of the clients in the band": (
                "Margin",
                [f"{clients}loss_median", f"{clients}loss_q1", f"{clients}loss_q3"],
            ),
            "Training loss: mean, all clients in the band": (
                "Margin",
                [train, f"{clients}loss_min", f"{clients}loss_max"],
            ),
            "Training loss: worst tenth, mean": (
                "Multiline",
                [f"{clients}loss_worst10", train],
            ),
            "Drift: cosine of updates to their mean": ("Multiline", [f"{one}cosine_to_mean"]),
            "Length of client updates": ("Multiline", ["(clients|nonprivate)/update_norm"]),
            "Clients: took part, dropped out, left out": (
                "Multiline",
                [".*(reported|clients)$", ".*dropped$", ".*nonfinite$"],
            ),
        },
        "Privacy": {
            "Epsilon: at most (accountant), at least (audit), planned; set smoothing to 0": (
                "Multiline",
                ["privacy/epsilon$", "privacy/epsilon_at_least", "privacy/epsilon_planned"],
            ),
            "Noised figures inside the budget: accuracy, its error": (
                "Multiline",
                ["noised/accuracy", "noised/error"],
            ),
            "Noise multiplier, its deviation, and clip": (
                "Multiline",
                ["privacy/noise_multiplier", "privacy/noise_std", "privacy/clip_norm"],
            ),
        },
        "System": {
            "Seconds: sample, train, aggregate, evaluate, log": (
                "Multiline",
                [f"time/{phase}" for phase in ("sample", "train", "aggregate", "evaluate", "log")],
            ),
            "Clients a second": ("Multiline", [".*clients_per_second"]),
            "Examples a second": ("Multiline", [".*examples_per_second"]),
            "Bytes: down, up": ("Multiline", [".*bytes_down", ".*bytes_up"]),
        },
    }
    return pages if private else {k: v for k, v in pages.items() if k != "Privacy"}
