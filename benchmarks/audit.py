"""What an audit in the run catches, and what it costs: ``python -m benchmarks.audit --help``.

``bugs``: each planted bug in one run, by bound and by check. ``right``: 20 seeds of the right build.
``power``: bound over claim at epsilon 1, 3 and 8, and accuracy with and without canaries, over 5 seeds.
``cost``: time of the default run with an audit over that without. Without a name, all of them.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from fedtorch import Audit, Local, Recipe, Server, divide, seeds
from fedtorch.data import Digits, Iid
from fedtorch.privacy import ClientLevel, Privacy, SampleLevel, gradients
from fedtorch.privacy.findings import Findings
from fedtorch.privacy.noise import streams
from fedtorch.run.zoo import build

Bug = Callable[[], Any]
"""A context in which the build is wrong."""


def noisy(change: Callable[[gradients.PrivateSteps], float]) -> Any:
    """Noise on the sum of a step is ``change`` times what it should be."""
    real = gradients.PrivateSteps.noisy

    def wrong(
        self: gradients.PrivateSteps,
        row: torch.Tensor,
        k: int,
        times: float = 1.0,
        part: bool = False,
        onto: streams.Onto | None = None,
    ) -> bool:
        return real(self, row, k, times * change(self), part, onto)

    return patch.object(gradients.PrivateSteps, "noisy", wrong)


def half_the_noise() -> Any:
    return noisy(lambda steps: 0.5)


def noise_divided_twice() -> Any:
    return noisy(lambda steps: 1 / steps.divisor)


def one_seed_for_all_rounds() -> Any:
    real = Privacy.stream

    def same(self: Privacy, *purpose: str | int) -> streams.Stream:
        if purpose[0] != "noise":
            return real(self, *purpose)
        return streams.stream("aes", 42, *(p for p in purpose if not isinstance(p, int)))

    return patch.object(Privacy, "stream", same)


def no_noise_on_an_empty_batch() -> Any:
    real = gradients.PrivateSteps.noisy

    def wrong(
        self: gradients.PrivateSteps,
        row: torch.Tensor,
        k: int,
        times: float = 1.0,
        part: bool = False,
        onto: streams.Onto | None = None,
    ) -> bool:
        return bool(row.any()) and real(self, row, k, times, part, onto)

    return patch.object(gradients.PrivateSteps, "noisy", wrong)


def clip_by_layer() -> Any:
    """Each layer's gradient is clipped by itself, and the noise is made for all of them together."""

    def wrong(stepping, params, rest, batch, mask, steps):  # type: ignore[no-untyped-def]
        from torch.func import grad_and_value, vmap

        def one(w: Any, r: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return stepping.losses(w, r, (x[None], y[None]))[0]

        fixed = {k: v.detach() for k, v in params.items()}
        each = vmap(vmap(grad_and_value(one), (None, None, 0, 0)))
        grads, losses = each(fixed, rest, *batch)
        total = {}
        for k, g in grads.items():
            factors = steps.factors(g.reshape(*g.shape[:2], -1).square().sum(2))
            total[k] = torch.einsum("kb,kb...->k...", factors * mask, g)
        return steps.finish(total), losses

    return patch("fedtorch.training.stacked.stacked_gradients", wrong)


def half_the_clip_is_claimed() -> Any:
    """Gradients are clipped to twice the norm that the noise is made for."""
    real = gradients.PrivateSteps.factors

    def wrong(self: gradients.PrivateSteps, sq_norms: torch.Tensor) -> torch.Tensor:
        return real(replace(self, clip=2 * self.clip), sq_norms)

    return patch.object(gradients.PrivateSteps, "factors", wrong)


def twice_the_rate() -> Any:
    real = SampleLevel.poisson

    def wrong(self: SampleLevel, *drawn: Any) -> torch.Tensor:
        return real(replace(self, sample_rate=2 * self.sample_rate), *drawn)

    return patch.object(SampleLevel, "poisson", wrong)


def half_the_central_noise() -> Any:
    real = ClientLevel.server
    return patch.object(
        ClientLevel, "server", lambda self, sums, state, z, n: real(self, sums, state, z / 2, n)
    )


def weighted_mean() -> Any:
    """Clients weigh by their examples, and the noise is made for uniform weights."""
    return patch.object(Recipe, "weighting", property(lambda self: "examples"))


def divided_by_the_cohort_there_was() -> Any:
    real = ClientLevel.server
    return patch.object(
        ClientLevel, "server", lambda self, sums, state, z, n: real(self, sums, state, z, n // 2)
    )


SAMPLE: dict[str, tuple[Bug, dict[str, Any]]] = {
    "half the noise": (half_the_noise, {}),
    "noise divided twice": (noise_divided_twice, {}),
    "one seed for all rounds": (one_seed_for_all_rounds, {}),
    "no noise on empty batches": (no_noise_on_an_empty_batch, {"sample_rate": 0.005}),
    "clip by layer": (clip_by_layer, {"solver": "stacked", "mode": "stacked"}),
    "twice the clip": (half_the_clip_is_claimed, {}),
    "twice the rate": (twice_the_rate, {}),
}
CLIENT: dict[str, tuple[Bug, dict[str, Any]]] = {
    "half the noise (client)": (half_the_central_noise, {}),
    "weighted mean (client)": (weighted_mean, {}),
    "divided by the cohort there was (client)": (divided_by_the_cohort_there_was, {}),
}


def sample_run(
    canaries: int = 1000,
    seed: int = 0,
    rounds: int = 30,
    model: str = "small",
    solver: str = "auto",
    guesses: float = 0.2,
    **plan: Any,
) -> tuple[Findings | None, float, float]:
    """The default private run of digits: what its audit found, accuracy, processor seconds of training."""
    data = Digits().load(seed)
    clients, test = divide(data, seed=seed)
    with seeds.seeded(seeds.derive(seed, "model")):
        net = build(model, data.facts, {})
    audit = Audit(canaries=canaries, guesses=guesses)
    recipe = Recipe(privacy=SampleLevel(rounds=rounds, **plan))
    server = Server(net, clients, recipe, seed=seed, engine=Local(solver=solver), observers=[audit])
    return trained(server, audit, test, rounds)


def client_run(
    canaries: int = 200, seed: int = 0, rounds: int = 20, guesses: float = 0.2, **plan: Any
) -> tuple[Findings | None, float, float]:
    """500 clients of digits, a logistic model, client level at rate 0.2."""
    data = Digits().load(seed)
    clients, test = divide(data, Iid(), 500, seed=seed)
    with seeds.seeded(seeds.derive(seed, "model")):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    audit = Audit(canaries=canaries, guesses=guesses)
    recipe = Recipe(privacy=ClientLevel(rounds=rounds, rate=0.2, clip=0.3, **plan))
    return trained(Server(net, clients, recipe, seed=seed, observers=[audit]), audit, test, rounds)


def trained(
    server: Server, audit: Audit, test: Any, rounds: int
) -> tuple[Findings | None, float, float]:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server.fit(rounds, progress=False)
    took = time.process_time() - start
    return audit.found, server.evaluate(test, ["accuracy"])["accuracy"], took


def caught(found: Findings) -> tuple[bool, bool]:
    """By the bound, and by anything else."""
    bound = found.at_least > found.at_most
    return bound, len(found.contradictions) > bound


def row(name: str, found: Findings) -> str:
    bound, check = caught(found)
    shift = f"{found.shift.value:.2f}" if found.shift else ""
    noise, step = found.noise, found.step_noise
    assert noise and step
    return (
        f"| {name} | {found.at_least:.2f} of {found.at_most:.2f}{' **caught**' * bound} | "
        f"{noise.value:.3g} | {step.value:.3g} | {shift} | {found.longest:.3g} | {found.missed} | "
        f"{'**caught**' if check else 'passes'} |"
    )


def bugs(seed: int) -> None:
    """One run for each planted bug, and the right build beside them; half of the canaries are guessed."""
    print("| build | bound | noise | of a step | shift | longest | steps past it | check |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for run, planted in ((sample_run, SAMPLE), (client_run, CLIENT)):
        found, _, _ = run(seed=seed, guesses=0.5)  # type: ignore[operator]
        print(row(f"right ({found.unit})", found), flush=True)
        for name, (bug, options) in planted.items():
            with bug():
                found, _, _ = run(seed=seed, guesses=0.5, **options)  # type: ignore[operator]
            print(row(name, found), flush=True)


def right(count: int) -> None:
    """Seeds of the right build: how near the bound comes to the claim, how often a check is outside."""
    for run in (sample_run, client_run):
        all_of = [run(seed=s)[0] for s in range(count)]  # type: ignore[operator]
        bounds = [f.at_least / f.at_most for f in all_of]
        noise = [f.noise.value for f in all_of]
        steps = [f.step_noise.value for f in all_of]
        shifts = [f.shift.value for f in all_of]
        print(
            f"{all_of[0].unit}: {count} seeds, refuted {sum(f.refuted for f in all_of)}; bound over claim "
            f"{statistics.mean(bounds):.2f} ({min(bounds):.2f} to {max(bounds):.2f}), noise "
            f"{min(noise):.3f} to {max(noise):.3f}, of a step {min(steps):.4f} to {max(steps):.4f}, shift "
            f"{min(shifts):.2f} to {max(shifts):.2f}",
            flush=True,
        )
        for f in all_of:
            if f.refuted:
                print("   ", f.contradictions)


def power(count: int) -> None:
    """Bound over claim, and accuracy with and without canaries."""
    print("| claim | bound, mean (least to most) | over the claim | accuracy with | without |")
    print("| --- | --- | --- | --- | --- |")
    for epsilon in (1.0, 3.0, 8.0):
        with_, without = [
            [sample_run(canaries=m, seed=s, epsilon=epsilon) for s in range(count)]
            for m in (1000, 0)
        ]
        bounds = [f.at_least for f, _, _ in with_ if f]
        one, other = ([a for _, a, _ in runs] for runs in (with_, without))
        print(
            f"| {epsilon:g} | {statistics.mean(bounds):.2f} ({min(bounds):.2f} to {max(bounds):.2f}) | "
            f"{statistics.mean(bounds) / epsilon:.2f} | {spread(one)} | {spread(other)} |",
            flush=True,
        )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} +- {statistics.stdev(values):.3f}"


def cost(pairs: int) -> None:
    """Processor time of training with an audit over that without, in turns."""
    ratios = []
    for k in range(pairs + 1):
        both = [sample_run(canaries=m)[2] for m in ((1000, 0) if k % 2 else (0, 1000))]
        if k:  # the first warms up
            ratios.append(both[0] / both[1] if k % 2 else both[1] / both[0])
    print(
        f"time with over without: median {statistics.median(ratios):.3f} ({min(ratios):.3f} to "
        f"{max(ratios):.3f}), {pairs} pairs"
    )


def main() -> None:
    parts = {"bugs": (bugs, 0), "right": (right, 20), "power": (power, 5), "cost": (cost, 15)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=parts, help="one of them alone")
    parser.add_argument("--count", type=int, help="seeds or pairs; of bugs the seed itself")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in [given.part] if given.part else parts:
        part, usual = parts[name]
        print(f"\n{name}: {part.__doc__}")
        part(usual if given.count is None else given.count)


if __name__ == "__main__":
    main()
