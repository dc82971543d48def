"""What every privacy plan has: one frozen object that owns sampling, clipping, noise and accounting.

The object that draws the batches or cohorts also clips, adds the noise and states the event the ledger
is charged with: what is accounted is what is done.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, final

import numpy as np
import torch
from torch import Tensor

from fedtorch import seeds
from fedtorch.options import COUNT, NOT_NEGATIVE, POSITIVE, RATE, TrainingOptions, briefly, check
from fedtorch.privacy import told
from fedtorch.privacy.accounting.events import (
    Event,
    Units,
    calibrate,
    check_accountant,
    check_delta,
    epsilon,
)
from fedtorch.privacy.clipping import check_clip
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import Stream, stream
from fedtorch.privacy.release import FIGURES, finite_loss, let_go
from fedtorch.training.batches import batch_orders
from fedtorch.types import TOLD, ConfigError, Params, Raw, Released, Stack, Task

if TYPE_CHECKING:
    from fedtorch.privacy.accounting.search import Trials

State = dict[str, Any]
"""What a plan carries from round to round: public numbers, and noise already released."""

DEFAULT_EPSILON = 8.0

STATISTICS_NOISE = 10.0
"""Noise multiplier of statistics of columns: the noise of a usual run grows by 0.1 % for them."""

MOST_NOISE = 1e9
"""Largest noise multiplier; an epsilon that asks for more is as much beyond what any accountant tells."""

LEAST = {"epsilon": 1e-6, "metrics_epsilon": 1e-6, "delta": 1e-100}
"""Smallest of what is to be spent."""

LEAST_NOISE = 1e-30
"""Standard deviation of noise that float32 still has digits for, many steps and divisors later."""


class PerExample(Protocol):
    """What is asked of a plan by whoever takes its local steps."""

    @property
    def sample_rate(self) -> float:
        """Chance of each example to be in a step."""

    @property
    def steps(self) -> int:
        """Local steps in a round."""

    @property
    def batch_size(self) -> float:
        """Fixed public divisor."""

    @property
    def max_batch(self) -> int:
        """Examples whose gradients are held at once."""

    @property
    def mode(self) -> str:
        """The way to gradients of examples."""

    @property
    def projected(self) -> bool:
        """Whether noise of the first layer is drawn where it is seen alone."""

    def by(self, mode: str) -> "Privacy":
        """The same plan by another way to the gradients of examples."""


@dataclass(frozen=True, kw_only=True)
class Privacy(ABC):
    """Options common to all plans. ``epsilon`` and ``delta`` hold for the whole run."""

    unit: ClassVar[Literal["example", "client", "nobody"]]
    """Whose presence the guarantee hides."""
    per_client: ClassVar[bool]
    """Whether the ledger charges each client, or the run as a whole."""
    searchable: ClassVar[bool] = False
    """Whether a search over settings can hide its runs: somebody is trusted who sees them all."""
    claims: ClassVar[bool] = True
    """Whether there is a guarantee at all."""
    central: ClassVar[bool] = False
    """Whether the server adds the noise: it is trusted, and clients tell it how they fared."""
    masked: ClassVar[bool] = False
    """Whether a client's noise is a share of what is needed, so that masks must show nobody but the sum."""
    statistics: ClassVar[bool] = False
    """Whether float buffers, statistics of the data that nobody noises, may leave a client."""
    weighting: ClassVar[Literal["examples", "uniform"]] = "uniform"
    """How clients are weighed where the strategy leaves it open."""
    metrics_apart: ClassVar[bool] = False
    """Whether figures are a release of their own; else they have a share of the clip, and all is one."""
    metrics_count: ClassVar[bool] = False
    """Whether how many are behind a figure is told by the figure alone."""
    default_lr: ClassVar[float] = 0.1
    """Client learning rate where none is given."""

    clip: float = 1.0
    """Clipping norm: the most one unit can change what is released, in parameter units."""
    epsilon: float | None = None
    """Target for the whole run, from which the noise is calibrated; none of the two given: 8."""
    noise_multiplier: float | None = None
    """Noise standard deviation over sensitivity, in place of a target epsilon."""
    delta: float = 1e-5
    """Chance the guarantee may fail; well below one over the number of units."""
    rounds: int | None = None
    """Rounds the plan is calibrated for; none: the run's rounds."""
    statistics_noise: float | None = None
    """Noise multiplier of statistics of columns (dataset.standardize private), which are released once
    before round 0 and are part of the budget; none: 10 where they are asked for."""
    person: int | None = None
    """Units (examples, or clients) of one person at most, over all clients: public. privacy.json then has
    their epsilon too; none: counted where dataset.person names a column."""
    search: int | None = None
    """Runs expected of a random search of which this one is released, and which epsilon pays for as a
    whole; --sweep.random sets it."""
    metrics_epsilon: float | None = None
    """How much of epsilon figures take, which the guarantee covers and strict tells: loss and accuracy of
    the model as clients were sent it, on their training data, clipped and noised. None: there are none."""
    metrics_every: int | None = None
    """Rounds between two such figures: fewer are less noisy. None: 10, or the last round of a short run."""
    metrics_loss: float = 5.0
    """Largest loss of an example that they count; what is larger counts as this, what is below 0 as 0."""
    accountant: Literal["prv", "rdp"] = "prv"
    """prv (tight) or rdp."""
    budget: Literal["stop", "error"] = "stop"
    """Before a round that would overspend: stop with the model so far, or fail."""
    strict: bool = False
    """Leave every figure that the guarantee does not cover out of logs and screen."""
    rng: Literal["aes", "os"] = "aes"
    """Noise from AES-256 under keys of the system, or each from four draws of the system itself."""
    insecure_seed: int | None = None
    """Makes noise repeatable, for tests: whoever knows it can take the noise off."""
    fix_model: bool = False
    """Replace, before round 0, layers that void the guarantee (BatchNorm) or are slow under it (LSTM)."""

    def __init_subclass__(cls, **options: Any) -> None:
        """There is one way out for all plans; raises TypeError where one has another."""
        super().__init_subclass__(**options)
        briefly(cls)
        if cls.release is not Privacy.release:
            raise TypeError(
                f"{cls.__name__}.release: a plan clips and noises in client() and server()"
            )

    def __post_init__(self) -> None:
        """Refuse what gives no guarantee, by name."""
        check_accountant(self.accountant)
        numbers = ["clip", "epsilon", "noise_multiplier", "batch_size", "statistics_noise"]
        numbers += ["metrics_loss"]
        counts = ["rounds", "steps", "max_batch", "weight_cap", "person", "search", "metrics_every"]
        ranges = dict.fromkeys(numbers, POSITIVE) | dict.fromkeys(counts, COUNT)
        ranges |= {"metrics_epsilon": NOT_NEGATIVE}
        check(self, "privacy", sample_rate=RATE, rate=RATE, **ranges)
        if self.epsilon is not None and self.noise_multiplier is not None:
            raise ConfigError("privacy takes epsilon or noise_multiplier, not both: leave one out")
        check_clip("privacy.clip", self.clip)
        if self.noise_multiplier and self.noise_multiplier * self.clip < LEAST_NOISE:
            raise ConfigError(
                f"privacy.noise_multiplier {self.noise_multiplier:g} at clip {self.clip:g} is noise "
                f"that vanishes in float32: their product must be at least {LEAST_NOISE:g}"
            )
        check_delta(self.delta)
        self._check_reach()
        told.check(self)
        if self.search is not None:
            if not self.searchable:
                raise ConfigError(
                    "privacy.search: who is not trusted sees every run, and each is charged: leave it out "
                    "(--sweep without --sweep.random), or choose privacy sample or client"
                )
            _ = self.trials

    def _check_reach(self) -> None:
        """Refuse what the accountants' arithmetic does not reach; no run is out there."""
        for name in ("noise_multiplier", "statistics_noise"):
            if (getattr(self, name) or 0) > MOST_NOISE:
                raise ConfigError(
                    f"privacy.{name} must be at most {MOST_NOISE:g}: beyond it there is nothing but noise"
                )
        for name, least in LEAST.items():
            if 0 < (value := getattr(self, name) or 0.0) < least:
                raise ConfigError(f"privacy.{name} must be at least {least:g}, got {value:g}")

    @property
    def always_reports(self) -> bool:
        """Whether a client whose update is not finite sends zero: who reports would tell of its data."""
        return self.unit == "client"

    @property
    def per_example(self) -> "PerExample | None":
        """The plan itself where every local step is clipped by example and noised; None elsewhere."""
        return None

    @property
    def trials(self) -> "Trials | None":
        """How many runs there are in the search that this is one of."""
        if self.search is None:
            return None
        from fedtorch.privacy.accounting.search import Trials

        return Trials(self.search)

    @property
    def target(self) -> float | None:
        """The epsilon that the run may spend; None where only the noise was given."""
        return None if self.noise_multiplier else self.epsilon or DEFAULT_EPSILON

    def stream(self, *purpose: str | int) -> Stream:
        """Randomness for one purpose, drawn where it is used."""
        return stream(self.rng, self.insecure_seed, *purpose)

    def calibrated(self, rounds: int) -> float:
        """Noise multiplier with which ``rounds`` planned rounds cost the target; found once, cached.

        Where figures are a release of their own it is what is left of it that the rounds cost.
        """
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        one = self.event(1.0)
        steps = one.steps * self.releases(rounds)
        target = (self.target or 0.0) - (self.metrics_epsilon or 0.0) * self.metrics_apart
        if self.trials:
            from fedtorch.privacy.accounting.search import search_noise

            known = target, self.delta, one.rate, steps
            return search_noise(*known, self.trials, self.once)
        return calibrate(target, self.delta, one.rate, steps, self.accountant, self.once)

    @property
    def once(self) -> tuple[Event, ...]:
        """What is released before round 0, and charged to everyone."""
        return (Event("gaussian", self.statistics_noise),) if self.statistics_noise else ()

    def planned_for(self, rounds: int) -> "Privacy":
        """The same plan of a run of ``rounds`` rounds, unless it names its own."""
        return replace(self, rounds=self.rounds or rounds)

    def placed(self, clients: int, threshold: int, coordinates: int) -> "Privacy":
        """The same plan in a run of so many clients a round, each of whom sends so many numbers.

        ``threshold``: fewest clients of whom masks show a sum; without masks it is of no interest.
        """
        return self

    def holds(self, clients: int, threshold: int) -> None:
        """Raises ConfigError where a round of so many, and masks of this threshold, are not the plan's."""
        return

    @property
    def fewest(self) -> int:
        """Of how many clients a sum must be, at least, for the noise to be enough."""
        return 0

    def slack(self, noise: float, rounds: int) -> float:
        """What delta is more than ``delta`` because draws are not exactly those of the mechanism."""
        return 0.0

    def planned(self, noise: float, rounds: int, figures: float | None = None) -> float:
        """Epsilon of ``rounds`` rounds for the unit that takes part most; ``figures``: noise of theirs."""
        return self.price(self.whole(noise, rounds, figures or told.figures_noise(self, rounds)))

    def whole(self, noise: float, rounds: int, figures: float | None) -> tuple[Event, ...]:
        """All that it is charged for in them."""
        one = self.event(noise)
        apart = self.apart(figures) if figures else ()
        beside = (replace(e, steps=told.times(self, rounds)) for e in apart)
        return (replace(one, steps=one.steps * self.releases(rounds)), *beside, *self.once)

    def apart(self, figures: float) -> tuple[Event, ...]:
        """What figures of one round cost beside it: nothing where they are a part of what it releases."""
        if not self.metrics_apart:
            return ()
        return (Event("gaussian", figures),)

    def price(self, events: Sequence[Event]) -> float:
        """Epsilon of a run with these releases; of the whole search, where it is the best of one."""
        if self.trials:
            from fedtorch.privacy.accounting.search import search_epsilon

            return search_epsilon(events, self.trials, self.delta)
        return epsilon(events, self.delta, self.accountant)

    def several(self, events: Sequence[Event], units: int) -> Units | None:
        """What ``events`` show of so many units, or of one in place of another; None: no bound is known."""
        return [(e, units) for e in events]

    @abstractmethod
    def event(self, noise: float) -> Event:
        """What one round costs each unit that is charged for it."""

    def releases(self, rounds: int) -> int:
        """Rounds, of ``rounds``, that one unit is charged for at most."""
        return rounds

    @abstractmethod
    def check(self, population: int, noise: float) -> list[str]:
        """Refuse what would void the claim among so many clients; notes to be said before training."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """In words: unit, neighbouring relation, who is trusted, mechanism."""

    def portion(self, vectors: np.ndarray, id: str, norm: float) -> np.ndarray:
        """What a client sends of its examples' vectors, [n, m] and none longer than ``norm``: [m].

        The client's half of ``once``; raises ConfigError where the plan has no such release.
        """
        raise ConfigError(
            f"{type(self).__name__} releases no statistics of columns: scale by public numbers, with "
            "dataset.bounds alone"
        )

    def total(self, portions: Sequence[np.ndarray], norm: float) -> np.ndarray:
        """The server's half: the noised sum [m] of what clients sent."""
        return np.asarray(np.stack(portions).sum(0, dtype=np.float64))

    # figures inside the budget (told.py)

    @property
    def beside(self) -> dict[str, Params]:
        """What a client sends for them beside the strategy's groups, in names and shapes."""
        return {TOLD: {"sum": torch.zeros(told.NUMBERS).double()}} if self.metrics_epsilon else {}

    def rest(self, share: float) -> float:
        """What share of the clip they leave: of a vector and one at right angles to it."""
        return math.sqrt(1 - share * share)

    @property
    def metrics_norm(self) -> float:
        """Largest norm of what a unit adds to figures, as the plan measures it."""
        return told.norm(self.metrics_count)

    def tell(self, examples: Tensor, task: Task, id: str) -> Tensor:
        """What a client sends, [3], of ``examples``, [n, 3]; ``client`` clips and noises it."""
        mean = told.summed(examples, self.metrics_count, mean=True)
        return torch.from_numpy(told.share(task) * task.privacy["clip"] / self.metrics_norm * mean)

    def heard(
        self, mean: Tensor, task: Task, clients: float, spread: float
    ) -> tuple[Tensor, float]:
        """The sum behind the mean of what clients sent, and the deviation of the noise on it.

        ``clients``: whom the mean is over; ``spread``: deviation of the noise on what is clipped.
        """
        part = told.share(task) * task.privacy["clip"] / self.metrics_norm
        return mean * (clients / part), spread / part

    # the round; what a plan does not do is the identity

    def batches(
        self, sizes: Sequence[int], options: TrainingOptions, task: Task, ids: Sequence[str]
    ) -> list[Tensor]:
        """Which examples each client takes in which step: [steps, batch] of places, short ones with -1."""
        turn = task.draw
        return batch_orders(
            sizes, options, [seeds.derive(task.seed, "order", *turn, i) for i in ids]
        )

    def steps_of(self, task: Task, ids: Sequence[str]) -> PrivateSteps | None:
        """What clips and noises the local steps of these clients; None: nothing does."""
        return None

    def draw_seed(self, task: Task, id: str) -> int:
        """What seeds the global generators while a client trains, for dropout and the like."""
        return seeds.derive(task.seed, "visit", *task.draw, id)

    def strategy_seed(self, task: Task, id: str) -> int:
        """What a strategy may draw from on a client; never a secret of the client's."""
        return self.draw_seed(task, id)

    def start(self, groups: dict[str, Params]) -> State:
        """State before round 0; ``groups`` has the shapes of what a client sends."""
        return {}

    def numbers(self, noise: float, state: State) -> dict[str, float]:
        """Public numbers the clients need this round: ``clip`` and ``noise`` (multiplier)."""
        return {"clip": self.clip, "noise": noise}

    def check_numbers(self, numbers: Mapping[str, float]) -> None:
        """Raises ConfigError where a task's public numbers cannot be meant."""
        check_clip("a task's clip", numbers["clip"])
        figures = numbers.get("figures", math.inf)
        least = 0.0 if self.metrics_apart else numbers["noise"]
        if not (self.metrics_epsilon and figures > least) and "figures" in numbers:
            raise ConfigError(f"a task's noise multiplier of figures cannot be {figures:g}")

    def hold(self, numbers: Mapping[str, float], round: int = 0) -> None:
        """Raises ConfigError where the public numbers of a round's task are not those of this plan.

        A client that joined a plan is charged for that plan: another clip or other noise is another run.
        """
        wanted = ["clip", *(["figures"] if told.due(self, round) else []), "noise"]
        if sorted(numbers) != wanted:
            raise ConfigError(
                f"a task's privacy must name {', '.join(wanted[:-1])} and noise, not "
                f"{', '.join(sorted(numbers)) or 'nothing'}"
            )
        self.hold_clip(numbers["clip"])
        if self.rounds is None:
            raise ConfigError("a plan without rounds does not say how much noise there is")
        own = {"noise": self.calibrated(self.rounds)}
        if "figures" in numbers:
            own["figures"] = told.figures_noise(self, self.rounds) or 0.0
        for name, noise in own.items():
            if not math.isclose(numbers[name], noise, rel_tol=1e-6):
                whose = " of figures" if name == "figures" else ""
                raise ConfigError(
                    f"a task's noise multiplier{whose} is {numbers[name]:g}, the plan's {noise:g}"
                )

    def hold_clip(self, clip: float) -> None:
        """Raises ConfigError where a round's clipping norm is not the plan's."""
        if clip != self.clip:
            raise ConfigError(f"a task's clip is {clip:g}, the plan's {self.clip:g}")

    def spread(self, noise: float, state: State, population: int) -> float:
        """Standard deviation of the noise on the sum that is clipped, in parameter units."""
        return noise * self.clip

    def cohort(self, population: int, round: int) -> list[int] | None:
        """This round's clients where the plan draws them, else None."""
        return None

    def charged(self, cohort: Sequence[int], population: int, round: int) -> list[int] | None:
        """Clients the ledger charges for a round, or None for the run as a whole."""
        return list(cohort) if self.per_client else None

    def share(self) -> float | None:
        """Public stand-in for cohort / population where the cohort is a secret."""
        return None

    @property
    def scales(self) -> bool:
        """Whether ``client`` does no more than multiply each update by ``scale``: a sum will do then."""
        return type(self).client is Privacy.client

    def client(
        self, sent: dict[str, Stack], examples: Tensor, task: Task, ids: Sequence[str]
    ) -> dict[str, Stack]:
        """The client's half: what leaves the client in place of ``sent``, each group [K, ...]."""
        return sent

    @property
    def shortens(self) -> bool:
        """Whether ``scale`` may give anything but ones."""
        return type(self).scale is not Privacy.scale

    def scale(self, norms: Tensor, examples: Tensor, task: Task) -> Tensor:
        """What ``client`` multiplies each update by, [K], where it ``scales``.

        ``norms`` must not be less than the updates' norms.
        """
        return torch.ones_like(norms)

    def grid(self, clients: int) -> tuple[float, int] | None:
        """Largest number of an update and steps in one, where ``client`` makes whole multiples of a step.

        For a round of so many clients under the aggregator secure; None: it makes any numbers.
        """
        return None

    def disclosed(self, figures: dict[str, Tensor]) -> dict[str, Tensor]:
        """Figures that clients may report under the plan, of ``figures``, [K] each."""
        # nobody else is trusted: what is not noised does not leave
        if self.strict and self.per_client:
            return {k: v for k, v in figures.items() if k == "update_norm"}
        return {k: v for k, v in finite_loss(figures).items() if k in FIGURES}

    @final
    def release(self, raw: Raw, task: Task) -> tuple[Released, Tensor]:
        """What leaves the clients of what their visits left, and whose visit was finite, [K] bool.

        Clip, noise, figures and buffers are the plan's; a client that is not finite is left out, or sends
        zero where who reports would tell of its data. What stays with a client, which nobody clips or
        noises, has no say in that under a plan that claims anything.
        Guarantee: whatever else a strategy or a solver left in ``raw`` stays where it is.
        """
        return let_go(self, raw, task)

    def taken(self, update: Released, groups: Collection[str], task: Task) -> Released:
        """What the server takes of an update of which a channel has decoded these groups."""
        return update

    def server(
        self, sums: dict[str, Params], state: State, noise: float, population: int
    ) -> tuple[dict[str, Params], State] | None:
        """The server's half: noised mean from the sum over clients; None: an ordinary mean will do."""
        return None
