"""Adaptive clipping: the clipping norm follows a quantile of the update norms, privately."""

import math
from dataclasses import dataclass

from fedtorch.options import INSIDE, POSITIVE, check
from fedtorch.privacy.noise.streams import Stream
from fedtorch.types import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaptiveClip:
    """C <- C exp(-lr (share below C - quantile)) (Andrew et al. 2021, arXiv:1905.03871, Alg. 1).

    The share is released with noise of its own. Its cost is paid by more noise on the update, so that
    both together cost what ``noise_multiplier`` alone says.
    """

    start: float = 0.1
    """First clipping norm."""
    quantile: float = 0.5
    """Share of the updates that should lie below the clipping norm."""
    lr: float = 0.2
    """How fast the norm moves, in log scale."""
    bit_noise: float | None = None
    """Noise on the number of clients below the norm; none: a twentieth of the expected cohort."""

    def __post_init__(self) -> None:
        """Refuse quantiles and rates that lead nowhere."""
        rates = {"start": POSITIVE, "lr": POSITIVE, "bit_noise": POSITIVE}
        check(self, "privacy.adaptive", quantile=INSIDE, **rates)

    def bit_std(self, expected: float) -> float:
        """Standard deviation of the noise on the sum of bits."""
        return expected / 20 if self.bit_noise is None else self.bit_noise

    def check(self, noise: float, expected: float) -> None:
        """The bits must be noisy enough to leave something of the budget for the update."""
        if noise >= 2 * self.bit_std(expected):
            raise ConfigError(
                f"privacy.adaptive: noise_multiplier {noise:g} must be below twice the noise on the "
                f"bits ({2 * self.bit_std(expected):g}): raise privacy.adaptive.bit_noise, or use a "
                "fixed clip"
            )

    def update_noise(self, noise: float, expected: float) -> float:
        """Multiplier for the update: (noise^-2 - (2 bit_std)^-2)^(-1/2), the paper's sec. 3.1."""
        self.check(noise, expected)
        return 1 / math.sqrt(1 / noise**2 - 1 / (2 * self.bit_std(expected)) ** 2)

    def next(self, clip: float, bits: float, expected: float, draw: Stream) -> float:
        """The clipping norm of the next round, from the sum of centred bits."""
        noisy = bits + self.bit_std(expected) * float(draw.normal((1,)))
        share = min(max(noisy / expected + 0.5, 0.0), 1.0)
        return clip * math.exp(-self.lr * (share - self.quantile))
