"""What goes together: strategy, aggregator, channel, plan, cohort, pace; else a sentence."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch.optim import SGD

from fedtorch.options import typed
from fedtorch.recipe import Recipe
from fedtorch.rounds.participation import Everyone, Participation, Uniform
from fedtorch.rounds.synchronous import Rounds, Synchronous
from fedtorch.rounds.threat import Attacked
from fedtorch.strategies import Strategy
from fedtorch.training.local_steps import varies
from fedtorch.types import ConfigError

Row = tuple[Callable[[Recipe, Participation, Rounds], object], str]


def _sees(strategy: Strategy) -> bool:
    return type(strategy).arrived is not Strategy.arrived


def _turns(strategy: Strategy) -> bool:
    return type(strategy).rests is not Strategy.rests


def _corrects(strategy: Strategy) -> bool:
    kind = type(strategy)
    linear = kind.correction is Strategy.correction and kind.correct is Strategy.correct
    return strategy.contrasts or not linear


def _plain_sgd(recipe: Recipe) -> bool:
    client = recipe.client_optimizer
    plain = client.maker() is SGD and not any(client.args.values())
    return plain and recipe.clip_norm is None and recipe.accumulate == 1 and not varies(recipe)


def _noised_once(strategy: Strategy) -> bool:
    """Whether what is sent is made of one pass alone, so that it is enough to clip and noise that one."""
    kind = type(strategy)
    own = _corrects(strategy) or strategy.measures or kind.upload is not Strategy.upload
    return strategy.apart and not own and not strategy.asks


def _drawn_past(recipe: Recipe) -> bool:
    """Whether a step of SGD goes past what its weights are drawn to, and further off than they were."""
    client, strategy = recipe.client_optimizer, recipe.strategy
    pull = getattr(strategy, strategy.draws_by) if strategy.draws_by else 0
    most = 2 * (1 + client.args.get("momentum", 0))
    return client.maker() is SGD and recipe.learning_rate * pull >= most


REFUSED: tuple[Row, ...] = (
    # a strategy by itself
    (
        lambda r, who, pace: (
            bool(type(r.strategy).__dataclass_fields__["personal"].default)
            and not r.strategy.personal
        ),
        "strategy {strategy} with no name in strategy.personal is fedavg: name the layers that stay with "
        "their client, or use fedavg",
    ),
    (
        lambda r, who, pace: _drawn_past(r),
        "strategy {strategy} draws weights back by lr times its mu, alpha or lam in each step, and from 2 "
        "on (2 + 2 momentum) a step ends further off than it began: lower lr or that option",
    ),
    # privacy, and what a visit's steps are made of
    (
        lambda r, who, pace: r.privacy.claims and r.strategy.weighting == "examples",
        "strategy.weighting examples voids the privacy claim: it releases how many examples each client "
        "has, and one client's weight has no bound; use uniform (or auto)",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.steps is not None,
        "sample-level privacy owns the steps: use --privacy.steps, not --steps",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.drop_last,
        "drop_last has no meaning for Poisson batches: leave it out",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.accumulate > 1,
        "accumulate has no meaning for Poisson batches: set their expected size by privacy.batch_size and "
        "privacy.sample_rate (privacy.max_batch is how many examples are in memory at once)",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.clip_norm is not None,
        "sample-level privacy clips each example's gradient, by privacy.clip: leave out clip_norm, which "
        "would clip the noised mean once more",
    ),
    (
        lambda r, who, pace: r.accumulate > 1 and r.batch_size is None,
        "accumulate needs a batch_size: without one a batch is all of a client's examples",
    ),
    (
        lambda r, who, pace: r.lr_floor and r.lr_decay == "constant",
        "lr_floor needs lr_decay linear or cosine: a constant learning rate falls to no floor",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.local,
        "local trains as it likes, so that nobody clips and noises what it learns of each example: use a "
        "step (Recipe(step=fn)), or protect clients (privacy client)",
    ),
    (
        lambda r, who, pace: r.local and (_corrects(r.strategy) or r.strategy.needs_rates),
        "strategy {strategy} changes the gradients of local steps, which a local update of your own takes "
        "itself: use FedAvg, or a step (Recipe(step=fn)) in place of local",
    ),
    (
        lambda r, who, pace: r.scheduler and varies(replace(r, scheduler=None)),
        "scheduler takes the place of lr_warmup and lr_decay: leave them out, or the scheduler",
    ),
    (
        lambda r, who, pace: r.scheduler and r.strategy.needs_rates,
        "strategy {strategy} needs the sum of a visit's learning rates, which a scheduler of your own does "
        "not tell beforehand: use lr_warmup and lr_decay, or strategy fedavg",
    ),
    # sums under masks or encrypted
    (
        lambda r, who, pace: r.hides and not r.secure and r.strategy.weighting == "examples",
        "aggregator {aggregator} weighs all clients alike, as none tells how many examples it has: use "
        "strategy.weighting uniform (or auto), or aggregator secure with a weight_cap",
    ),
    (
        lambda r, who, pace: r.hides and not r.secure and r.privacy.central,
        "with aggregator {aggregator} a client opens the sum, and would see it before the server adds the "
        "noise of client-level privacy: use aggregator secure, or sample or local privacy",
    ),
    (
        lambda r, who, pace: r.secure and r.strategy.weighting == "examples",
        "aggregator secure weighs clients by a share of a public number, as none tells how many examples "
        "it has: give aggregator.weight_cap, and leave strategy.weighting out",
    ),
    (
        lambda r, who, pace: r.secure and r.secure.weight_cap and r.weighting != "examples",
        "aggregator.weight_cap would do nothing where clients count alike, as under a privacy plan or with "
        "strategy.weighting uniform: leave it out",
    ),
    (
        lambda r, who, pace: r.hides and r.channel,
        "aggregator {aggregator} adds numbers that it cannot read, and codes of a channel cannot be added: "
        "use no channel (aggregator.width 32 of secure halves the bytes)",
    ),
    (
        lambda r, who, pace: r.hides and _sees(r.strategy),
        "aggregator {aggregator} shows nobody a client's own update, which strategy {strategy} has to see: "
        "use a strategy that only averages (of LoRA, FFALoRA), or aggregator mean",
    ),
    (
        lambda r, who, pace: r.hides and (pace.timed or pace.overlaps),
        "pace {pace} takes who is first, and aggregator {aggregator} opens one sum of all that were asked: "
        "use pace synchronous, or aggregator mean",
    ),
    (
        lambda r, who, pace: r.privacy.masked and not r.secure,
        "privacy distributed adds a share of the noise at each client, which is enough in the sum alone: "
        "use --aggregator secure, which shows nobody more (or privacy local, where each adds all of it)",
    ),
    (
        lambda r, who, pace: r.privacy.masked and r.secure and r.secure.neighbours,
        "privacy distributed holds against a server that lies, and aggregator.neighbours only against one "
        "that follows the protocol: leave neighbours out",
    ),
    (
        lambda r, who, pace: r.privacy.masked and not isinstance(who, Everyone | Uniform),
        "privacy distributed makes each client's share of the noise for rounds of one size, and sums of "
        "fewer are not opened: use participation everyone or uniform in place of {participation} (for "
        "chance in who takes part nothing is claimed)",
    ),
    (
        lambda r, who, pace: r.hides and r.privacy.statistics_noise,
        "with private statistics of columns (privacy.statistics_noise) each client tells numbers of its "
        "own, in no sum of all: leave them out with aggregator {aggregator}, and scale by public numbers "
        "(dataset.bounds)",
    ),
    (
        lambda r, who, pace: r.secure and r.privacy.central and r.privacy.share() != 1,
        "aggregator secure shows each client of a round who else is in it, which voids amplification by "
        "secret coins: use --privacy.rate 1 (and no privacy.bands)",
    ),
    # client-level privacy, rules of rows, the channel
    (
        lambda r, who, pace: r.privacy.central and type(who) is not Everyone,
        "client-level privacy draws the cohort itself, by secret coins: use --privacy.rate in place of "
        "participation {participation} (a fixed-size cohort would void the claim)",
    ),
    (
        lambda r, who, pace: r.privacy.central and not r.aggregator.linear,
        "aggregator {aggregator} voids the claim of client-level privacy: its noise is made for a sum of "
        "clipped updates, which one client moves no further than the clipping norm; use aggregator mean, "
        "or sample or local privacy, where noise comes first",
    ),
    (
        lambda r, who, pace: r.privacy.central and any(stage.feedback for stage in r.channel),
        "channel.feedback is of no use under client-level privacy: what earlier codes left out makes an "
        "update longer than the clipping norm, and the server cuts that off; use channel.feedback false",
    ),
    (
        lambda r, who, pace: any(not stage.leads for stage in r.channel[:-1]),
        "channel {stage} comes last: a stage after it would have to encode its code, which has no numbers "
        "of the update in it",
    ),
    (
        lambda r, who, pace: not r.aggregator.linear and r.strategy.weighting == "examples",
        "aggregator {aggregator} counts every client once, so strategy.weighting examples would do "
        "nothing: use uniform (or auto)",
    ),
    (
        lambda r, who, pace: r.privacy.central and _sees(r.strategy),
        "strategy {strategy} looks at each client's own update, and the noise of client-level privacy is "
        "made for their sum: take sample or local privacy, or a strategy that only averages (of LoRA, "
        "FFALoRA)",
    ),
    # strategies of several passes, of their own steps or numbers
    (
        lambda r, who, pace: r.privacy.claims and r.strategy.measures,
        "strategy {strategy} sends numbers that no noise is made for, such as lengths, losses or steps, "
        "which void the privacy claim: use fedavg (fednova is fedavg where all take equally many steps), "
        "or --privacy none",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.strategy.asks,
        "strategy {strategy} sends what it makes of losses or gradients that it asks of a client's "
        "examples, and sample-level privacy noises local steps alone: use fedavg, client-level or local "
        "privacy, or --privacy none",
    ),
    (
        lambda r, who, pace: r.privacy.per_example and r.strategy.contrasts,
        "strategy {strategy} has an objective of its own, which may run the model several times for an "
        "example, and sample-level privacy clips the gradient of one run and its loss: use fedavg or "
        "fedprox, client-level or local privacy, or --privacy none",
    ),
    (
        lambda r, who, pace: (
            r.privacy.per_example and r.strategy.trains and not _noised_once(r.strategy)
        ),
        "strategy {strategy} sends steps that start from what another pass made of a client's examples: "
        "one example moves the gradients of all others then, which no clip bounds, and sample-level "
        "privacy noises one pass: use strategy ditto, fedper or fedbabu, client-level or local privacy, or "
        "--privacy none",
    ),
    (
        lambda r, who, pace: r.local is not None and (r.strategy.trains or r.strategy.asks),
        "local takes the place of local steps, and strategy {strategy} takes them in several passes or "
        "asks for losses and gradients: leave out one of them",
    ),
    (
        lambda r, who, pace: r.strategy.steps_itself and not _plain_sgd(r),
        "strategy {strategy} takes steps of its own by the gradient times lr: leave out clip_norm, "
        "accumulate, lr_warmup, lr_decay and scheduler, and use --optimizer SGD without momentum or decay",
    ),
    (
        lambda r, who, pace: r.strategy.overshoots(r.learning_rate),
        "strategy {strategy} goes lr lam of the way to a client's own model on each batch, and that model "
        "inner_lr lam of the way back: from 1 on they overshoot; lower lr or strategy.lam",
    ),
    (
        lambda r, who, pace: not r.aggregator.linear and r.strategy.measures,
        "aggregator {aggregator} takes of clients what it trusts, and {strategy} needs the mean of the "
        "numbers that all of them send: use aggregator mean, or fedavg",
    ),
    (
        lambda r, who, pace: r.privacy.metrics_epsilon and r.strategy.personal,
        "privacy.metrics_epsilon tells how the model is that clients are sent, and strategy {strategy} "
        "leaves parts of it with them: leave out one of them",
    ),
    (
        lambda r, who, pace: r.privacy.metrics_epsilon and r.local,
        "privacy.metrics_epsilon needs a loss, and local tells none of an example: leave out one of them",
    ),
    (
        lambda r, who, pace: r.privacy.metrics_epsilon and not r.aggregator.linear,
        "privacy.metrics_epsilon needs the sum of what clients tell, and aggregator {aggregator} takes "
        "what it trusts: use aggregator mean or secure, or leave metrics_epsilon out",
    ),
    (
        lambda r, who, pace: r.privacy.metrics_epsilon and pace.overlaps,
        "privacy.metrics_epsilon tells of one model, and with pace {pace} clients have several: use pace "
        "synchronous, or leave metrics_epsilon out",
    ),
    (
        lambda r, who, pace: r.strategy.sgd and r.client_optimizer.maker() is not SGD,
        "strategy {strategy} holds for clients that train with SGD, whose steps it knows the reach of: use "
        "--optimizer SGD (with momentum, if you like), or fedavg",
    ),
    (
        lambda r, who, pace: r.strategy.sgd and r.scheduler,
        "strategy {strategy} must know how far a client's steps go, and scheduler says it to nobody: use "
        "lr_warmup and lr_decay",
    ),
    (
        lambda r, who, pace: r.channel and _turns(r.strategy),
        "strategy {strategy} sends other weights from round to round, and a channel has one list of them: "
        "use no channel",
    ),
    # paces
    (
        lambda r, who, pace: pace.timed and r.privacy.central,
        "pace {pace} voids the claim of client-level privacy: who counts is not left to secret coins, and "
        "one client more may take another's place; use sample or local privacy, or pace synchronous",
    ),
    (
        lambda r, who, pace: pace.timed and r.privacy.strict and not r.privacy.per_example,
        "privacy.strict keeps to itself how many examples a client has, but with pace {pace} the model "
        "depends on who is first, and who has more takes longer; leave one of them out",
    ),
    (
        lambda r, who, pace: pace.overlaps and who != Everyone(),
        "pace {pace} asks whoever is free: leave participation out (everyone, none lost)",
    ),
    (
        lambda r, who, pace: pace.overlaps and (_turns(r.strategy) or _sees(r.strategy)),
        "pace {pace} adds up changes of one list of weights, and strategy {strategy} sends others from "
        "round to round or looks at each client's own: use pace synchronous",
    ),
    (
        lambda r, who, pace: pace.overlaps and not r.aggregator.linear,
        "pace {pace} weighs each change by its age, and needs the aggregator mean",
    ),
)
"""What is refused, and why."""


def left_to_pace(strategy: Strategy, pace: Rounds) -> Strategy:
    """The strategy with what it leaves to the pace: visits that overlap count alike, as in FedBuff."""
    left = pace.overlaps and strategy.weighting == "auto"
    return replace(strategy, weighting="uniform") if left else strategy


def refusal(
    recipe: Recipe,
    participation: Participation = Everyone(),
    pace: Rounds = Synchronous(),
    groups: Collection[str] = (),
) -> str | None:
    """The sentence that these are refused with, or None.

    ``groups``: what the strategy sends, broadcasts or remembers beside the change of the weights.
    """
    attack: Any = recipe.aggregator
    if isinstance(attack, Attacked):
        honest = replace(recipe, aggregator=attack.rule)
        if why := refusal(honest, participation, pace, groups):
            return why
        if recipe.privacy.central:
            return (
                f"threat {typed(attack.threat)} forges what single clients send, and the noise of "
                "client-level privacy is made for a sum of what they learned: leave threat out, or take "
                "sample or local privacy"
            )
        why = _refused(recipe, participation, pace, groups)
        lies = f"threat {typed(attack.threat)} puts its own in the place of what single clients send, so"
        return (
            why
            and f"{lies} the server has no mean of what they learned: {why}; or leave threat out"
        )
    return _refused(recipe, participation, pace, groups)


def _refused(
    recipe: Recipe, participation: Participation, pace: Rounds, groups: Collection[str]
) -> str | None:
    parts = {
        "aggregator": recipe.aggregator,
        "participation": participation,
        "pace": pace,
        "strategy": recipe.strategy,
    }
    words = {k: typed(getattr(part, "rule", part)) for k, part in parts.items()}
    stuck = [s for s in recipe.channel[:-1] if not s.leads]
    words["stage"] = typed(stuck[0]) if stuck else ""
    for applies, why in REFUSED:
        if applies(recipe, participation, pace):
            return why.format(**words)
    if pace.overlaps and groups:
        return (
            f"pace {words['pace']} takes changes of weights alone: strategy "
            f"{words['strategy']} also needs {', '.join(sorted(groups))}, which "
            "belongs to one round; use pace synchronous or over-selected, or fedavg or fedprox"
        )
    every = all(stage.linear and not stage.unbiased for stage in recipe.channel)
    exact = recipe.aggregator.linear and every
    return recipe.strategy.admits(exact)


def check(
    recipe: Recipe,
    participation: Participation = Everyone(),
    pace: Rounds = Synchronous(),
    groups: Collection[str] = (),
) -> None:
    """Raises ConfigError where these do not go together."""
    if why := refusal(recipe, participation, pace, groups):
        raise ConfigError(why)
