"""An audit of a run's privacy claim in the run itself: canaries go along, and what shows of them counts."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fedtorch.options import NOT_NEGATIVE, RATE, check, typed
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.observers import Observer, State
from fedtorch.run.names import written
from fedtorch.strategies.base import Strategy
from fedtorch.types import AUDIT, ClaimRefuted, ConfigError

if TYPE_CHECKING:  # what an audit alone needs is read when there is one
    from fedtorch.privacy.canary_clients import CanaryClients
    from fedtorch.privacy.findings import CanaryResults, Findings

EXAMPLES = 1000
"""Canaries of an audit that names no number, where they are examples."""

CLIENTS = 50
"""Clients to one canary client, likewise: where clients are few, canaries cost accuracy."""

CHART = 1e-3
"""How exactly the bound is found for the chart."""

POINTS = 10
"""How many points the chart has, about; the bound takes its time."""


@dataclass
class UnderWay:
    """An audit's own memory of a run."""

    server: Any = None
    plan: Any = None
    clients: "CanaryClients | None" = None
    """Under client-level privacy."""
    due: Counter[str] = field(default_factory=Counter)
    """Noised steps that were charged, by client; under client-level privacy rounds."""
    left: State = field(default_factory=dict)
    """Canary clients of a checkpoint."""
    last: int = 0
    """The last round."""
    std: float = 0.0
    """Of the noise that is claimed for the round that is under way."""
    longest: float = 0.0
    """Of a few real examples' contributions, over the clipping norm."""
    found: "Findings | None" = None

    def drawn(self) -> bool:
        """Whether this round has a point in the chart."""
        now: int = self.server.round_number
        return now >= self.last or now % max(1, self.last // POINTS) == 0


@dataclass(frozen=True, kw_only=True)
class Audit(Observer):
    """Tests the claim of a privacy plan in the run that makes it; ``found`` has what came of it.

    Under sample-level privacy canaries are examples whose gradient is one coordinate; under client-level
    privacy they are clients with a direction of their own. Each is in the run by a fair coin, and takes
    part as any other does. From what shows of them an attack proves that epsilon is at least so much
    (Mahloujifar, Melis and Chaudhuri 2024, arXiv:2410.22235), and noise, rate and clip are held to what is
    claimed. Canaries change the model a little.
    """

    canaries: int | None = None
    """How many; none: 1,000 examples, or a client to 50 that there are. 0: none, and no audit."""
    guesses: float = 0.2
    """Share of them that the attack dares to guess."""
    harmless: ClassVar[bool] = True
    """Scores are of coins and noise: what others sent is taken off."""
    _now: UnderWay = field(default_factory=UnderWay, init=False, repr=False, compare=False)
    """Its memory of the run that it is in: none of its options, and changes as the run goes on."""

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        check(self, "audit", canaries=NOT_NEGATIVE, guesses=RATE)

    @property
    def found(self) -> "Findings | None":
        """What came of it, once the run is over."""
        return self._now.found

    def begin(self, server: Any, rounds: int, figures: Metrics) -> str | None:
        """Put the canaries in; raises ConfigError where a claim cannot be audited so."""
        if self.canaries == 0:
            return None
        auditable(server)
        self._now.server, self._now.plan = server, server.private.plan
        self._now.last = rounds
        if self._now.plan.central:
            count = self._clients_join()
            return f"audit: {count:,} canary clients, each there by a fair coin, change the model a little"
        count = self._examples_join()
        self._now.longest = longest(server)
        return f"audit: {count:,} canary examples, each there by a fair coin, change the model a little"

    def _examples_join(self) -> int:
        from fedtorch.privacy.canaries import placed

        server, ids = self._now.server, self._now.server.ids
        numbers = whole_steps(server)
        room = numbers * len(ids)
        count = min(EXAMPLES, room) if self.canaries is None else self.canaries
        if count > room:
            raise ConfigError(
                f"audit.canaries {count} is too many: each has a weight of its own, and {len(ids)} clients "
                f"with {numbers:,} weights have room for {room:,}"
            )
        memory = server.session.memory()
        if any(AUDIT in kept for kept in memory.values()):  # a run that goes on has its canaries
            return count
        for k, id in enumerate(ids):
            if own := count // len(ids) + (k < count % len(ids)):
                kept = placed(self._now.plan, id, own, numbers)
                memory = memory | {id: memory.get(id, {}) | {AUDIT: kept}}
        server.session.restore(memory)
        return count

    def _clients_join(self) -> int:
        from fedtorch.privacy.canary_clients import CanaryClients

        server = self._now.server
        weights = server.model.state_dict()
        like = {k: weights[k] for k in server.trainable}
        numbers = sum(v.numel() for v in like.values())
        usual = min(max(2, len(server.ids) // CLIENTS), numbers)
        count = usual if self.canaries is None else self.canaries
        if count > numbers:
            raise ConfigError(
                f"audit.canaries {count} is too many: each has a weight of its own, and the model has "
                f"{numbers:,}"
            )
        if self._now.clients is None:
            count = len(
                self._now.left.get("inside", range(count))
            )  # a run that goes on has its own
            self._now.clients = CanaryClients(self._now.plan, like, count, self._now.left)
        return count

    def join(self, total: Any, task: Any) -> None:
        """Canary clients that are drawn send their update."""
        if self._now.clients:
            books = self._now.server.books
            self._now.std = books.plan.spread(books.noise, books.state, len(books.ids))
            self._now.clients.join(total, task, self._now.server.recipe.weights)

    def noised(self, mean: Mapping[str, Any]) -> None:
        """What the server's noise has left of the sum."""
        if self._now.clients:
            expected = self._now.plan.share() * len(self._now.server.ids)
            self._now.clients.noised(mean, expected, self._now.std)

    def round(self, figures: Metrics) -> Metrics:
        """The bound, in some rounds for the chart; only the last one is the audit's."""
        if self.canaries == 0:
            return {}
        if self._now.server is None:
            raise ConfigError(
                "audit puts its canaries in before training: use server.fit or server.rounds, not single "
                "rounds"
            )
        if self._now.clients:
            self._now.due["rounds"] += 1
        else:
            for id in figures["cohort"]:
                self._now.due[id] += self._now.plan.steps
        if not self._now.drawn():
            return {}
        return {"privacy_epsilon_at_least": self._judged(CHART).at_least}

    def finish(self, server: Any) -> None:
        """Judge the whole run; warns where the claim is refuted."""
        if self.canaries != 0:
            self._now.found = found = self._judged(1e-9)
            if found.refuted:
                warnings.warn(f"audit: {'; '.join(found.contradictions)}", stacklevel=2)

    def refute(self) -> None:
        """Raises ClaimRefuted where the claim is."""
        if self.found and self.found.refuted:
            raise ClaimRefuted(
                f"the privacy claim is refuted: {'; '.join(self.found.contradictions)}"
            )

    def _judged(self, exact: float) -> "Findings":
        from fedtorch.privacy.findings import judged

        books = self._now.server.private
        return judged(self._seen(), books.spent(), books.delta, self.guesses, exact=exact)

    def _seen(self) -> "CanaryResults":
        from fedtorch.privacy.findings import of_examples, pooled

        plan, noise = self._now.plan, self._now.server.private.noise
        if self._now.clients:
            return self._now.clients.seen(plan.rate, self._now.due["rounds"])
        kept = {i: m[AUDIT] for i, m in self._now.server.session.memory().items() if AUDIT in m}
        all_of = pooled(
            [
                of_examples(k, plan.sample_rate, plan.clip, noise, self._now.due[i])
                for i, k in kept.items()
            ]
        )
        return replace(all_of, longest=max(all_of.longest, self._now.longest))

    def state_dict(self) -> State:
        """What was charged so far, and canary clients; canary examples are in clients' memory."""
        clients = self._now.clients.state if self._now.clients else {}
        return {"due": dict(self._now.due), "clients": clients} if self._now.due else {}

    def load_state_dict(self, state: State) -> None:
        """Go on with the same canaries."""
        self._now.due = Counter(state["due"])
        self._now.left = dict(state["clients"])
        if self._now.clients:
            self._now.clients.state = self._now.left


def auditable(server: Any) -> None:
    """Raises ConfigError, saying why, where no canaries can be put into a run."""
    recipe, strategy = server.recipe, server.recipe.strategy
    plan = recipe.privacy
    if not plan.claims:
        raise ConfigError(
            "audit tests a privacy claim, and this run makes none: leave audit out, or choose a privacy "
            "plan"
        )
    if plan.strict:
        raise ConfigError(
            "audit puts canaries into the model that is released, which privacy.strict does not allow: "
            "audit the same run without strict"
        )
    if not (plan.per_example or plan.central):
        raise ConfigError(
            f"audit knows sample-level and client-level privacy, and not {written(plan)}: leave audit out"
        )
    if any(not hasattr(c, "data") for c in server.clients):
        raise ConfigError(
            "audit puts canaries among the clients' examples, and sites have not agreed to that: audit a "
            "simulation of the same plan"
        )
    if type(strategy).rests is not Strategy.rests:
        raise ConfigError(
            f"audit gives each canary a weight, and strategy {typed(strategy)} rests some of them in turn: "
            "leave audit out"
        )
    if getattr(plan, "bands", None):
        raise ConfigError(
            "audit knows independent noise, and privacy.bands correlates it: leave one of them out"
        )
    if plan.central and recipe.hides:
        raise ConfigError(
            f"audit adds canary clients to the sum, and aggregator {typed(recipe.aggregator)} shows it to "
            "nobody: take aggregator mean"
        )


def whole_steps(server: Any) -> int:
    """How many numbers a noised step has; with projected noise those of the layers behind the first."""
    params: dict[str, int] = {
        k: p.numel() for k, p in server.model.named_parameters() if p.requires_grad
    }
    numbers = sum(params.values())
    if server.recipe.privacy.per_example.projected:
        first = _local(server).choice.solver.chain.layers[0]
        numbers -= params[first.weight] + params.get(first.bias, 0)
    if not numbers:
        raise ConfigError(
            "audit reads whole noised steps, and with privacy.projected a model of one layer has none: "
            "leave privacy.projected out"
        )
    return int(numbers)


def _local(server: Any) -> Any:
    return getattr(server.session, "local", server.session)


def longest(server: Any, most: int = 8) -> float:
    """The longest that one example's clipped gradient is, over the clipping norm, by the run's own solver.

    Tried on some clients' first examples, with a norm that is shorter than any gradient.
    """
    import torch

    from fedtorch import seeds
    from fedtorch.privacy.canaries import Gauge
    from fedtorch.training.local_update import context
    from fedtorch.training.module import snapshot
    from fedtorch.training.stacked import Chunk, general
    from fedtorch.types import Task

    session = _local(server)
    solve, model, plan = session.choice.solver, session.model, session.recipe.privacy.per_example
    plan = replace(plan, projected=False)  # of whose steps there are parts alone
    recipe = replace(session.choice.recipe, privacy=plan)
    clip, clients = 1e-6 * plan.clip, [*session.clients.values()][:most]
    task = Task(
        snapshot(server.model),
        server.extras,
        server.round_number,
        server.seed,
        recipe.learning_rate,
        {"clip": clip, "noise": 0.0},
    )
    gauge, at = Gauge.new(), torch.zeros(1, 1, dtype=torch.int64)
    for some in [[c] for c in clients] if solve is general else [clients]:
        order = [at] * len(some)
        ctx = context(some, order, task, recipe, model)
        steps = plan.steps_of(task, [c.id for c in some])
        private = replace(steps, streams=[gauge] * len(some))
        with seeds.seeded(0):
            chunk = Chunk([c.data for c in some], order, ctx, private, (0,) * len(some))
            solve(model, chunk, task, recipe)
    return gauge.longest / float(clip)


def found_in(server: Any) -> "Findings | None":
    """What the audit of a run has found, where there was one."""
    return next((o.found for o in server.observers if isinstance(o, Audit)), None)
