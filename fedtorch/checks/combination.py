"""What goes together: strategy, aggregator, channel, plan and cohort; a sentence for all that does not."""

from collections.abc import Callable
from dataclasses import replace

from fedtorch.recipe import Recipe
from fedtorch.rounds.participation import Everyone, Participation
from fedtorch.strategies import Strategy
from fedtorch.training.local_steps import varies
from fedtorch.types import ConfigError

Row = tuple[Callable[[Recipe, Participation], object], str]

REFUSED: tuple[Row, ...] = (
    (
        lambda r, _: r.privacy.claims and r.strategy.weighting == "examples",
        "strategy.weighting examples voids the privacy claim: it releases how many examples each client "
        "has, and one client's weight has no bound; use uniform (or auto)",
    ),
    (
        lambda r, _: r.privacy.per_example and r.steps is not None,
        "sample-level privacy owns the steps: use --privacy.steps, not --steps",
    ),
    (
        lambda r, _: r.privacy.per_example and r.drop_last,
        "drop_last has no meaning for Poisson batches: leave it out",
    ),
    (
        lambda r, _: r.privacy.per_example and r.accumulate > 1,
        "accumulate has no meaning for Poisson batches: set their expected size by privacy.batch_size and "
        "privacy.sample_rate (privacy.max_batch is how many examples are in memory at once)",
    ),
    (
        lambda r, _: r.privacy.per_example and r.clip_norm is not None,
        "sample-level privacy clips each example's gradient, by privacy.clip: leave out clip_norm, which "
        "would clip the noised mean once more",
    ),
    (
        lambda r, _: r.accumulate > 1 and r.batch_size is None,
        "accumulate needs a batch_size: without one a batch is all of a client's examples",
    ),
    (
        lambda r, _: r.lr_floor and r.lr_decay == "constant",
        "lr_floor needs lr_decay linear or cosine: a constant learning rate falls to no floor",
    ),
    (
        lambda r, _: r.scheduler and varies(replace(r, scheduler=None)),
        "scheduler takes the place of lr_warmup and lr_decay: leave them out, or the scheduler",
    ),
    (
        lambda r, _: r.scheduler and r.strategy.needs_rates,
        "{strategy} needs the sum of a visit's learning rates, which a scheduler of your own does not "
        "tell beforehand: use lr_warmup and lr_decay, or FedAvg",
    ),
    (
        lambda r, who: r.privacy.central and type(who) is not Everyone,
        "client-level privacy draws the cohort itself, by secret coins: use --privacy.rate in place of "
        "participation {participation} (a fixed-size cohort would void the claim)",
    ),
    (
        lambda r, _: r.privacy.central and not r.aggregator.linear,
        "aggregator {aggregator} voids the claim of client-level privacy: its noise is made for a sum of "
        "clipped updates, which one client moves no further than the clipping norm; use aggregator mean, "
        "or sample or local privacy, where noise comes first",
    ),
    (
        lambda r, _: r.privacy.central and any(stage.feedback for stage in r.channel),
        "channel.feedback is of no use under client-level privacy: what earlier codes left out makes an "
        "update longer than the clipping norm, and the server cuts that off; use channel.feedback false",
    ),
    (
        lambda r, _: len(r.channel) > 1,
        "a channel has one stage: a second one would have to encode the code of the first",
    ),
    (
        lambda r, _: not r.aggregator.linear and r.strategy.weighting == "examples",
        "aggregator {aggregator} counts every client once, so strategy.weighting examples would do "
        "nothing: use uniform (or auto)",
    ),
    (
        lambda r, _: r.privacy.central and type(r.strategy).arrived is not Strategy.arrived,
        "strategy {strategy} looks at each client's own update, and the noise of client-level privacy is "
        "made for their sum: take sample or local privacy, or a strategy that only averages (of LoRA, "
        "FFALoRA)",
    ),
    (
        lambda r, _: r.channel and type(r.strategy).rests is not Strategy.rests,
        "strategy {strategy} sends other weights from round to round, and a channel has one list of them: "
        "use no channel",
    ),
)
"""What is refused, and why."""


def refusal(recipe: Recipe, participation: Participation) -> str | None:
    """The sentence that these are refused with, or None."""
    words = {
        "aggregator": type(recipe.aggregator).__name__.lower(),
        "strategy": type(recipe.strategy).__name__,
        "participation": type(participation).__name__.lower(),
    }
    for applies, why in REFUSED:
        if applies(recipe, participation):
            return why.format(**words)
    exact = recipe.aggregator.linear and all(stage.linear for stage in recipe.channel)
    return recipe.strategy.admits(exact)


def check(recipe: Recipe, participation: Participation = Everyone()) -> None:
    """Raises ConfigError where these do not go together."""
    if why := refusal(recipe, participation):
        raise ConfigError(why)
