"""The coefficients of fedtorch/privacy/noise/normals.py: python tools/coefficients.py.

Weighted least squares at Chebyshev nodes, in 60 digits. Each coefficient is rounded to a float64 before
the next ones are fitted again, so that they make up for its rounding.
"""

from collections.abc import Callable

from mpmath import cos, log, lu_solve, matrix, mp, mpf, pi, sin, sqrt  # comes with torch

Function = Callable[[mpf], mpf]


def fit(f: Function, top: mpf, terms: int, weight: Function) -> tuple[float, ...]:
    """The c of sum c_k z^k near f(z) on [0, top], where an error counts times ``weight``."""
    n = 6 * terms
    nodes = [top * (1 + cos(pi * (2 * i + 1) / (2 * n))) / 2 for i in range(n)]
    left, known = [f(z) for z in nodes], []
    for k in range(terms):
        powers = matrix([[weight(z) * z**j for j in range(k, terms)] for z in nodes])
        target = matrix([weight(z) * y for z, y in zip(nodes, left, strict=True)])
        known.append(float(lu_solve(powers, target)[0]))
        left = [y - known[k] * z**k for z, y in zip(nodes, left, strict=True)]
    return tuple(known)


def coefficients() -> dict[str, tuple[float, ...]]:
    """All of them, by their names there."""
    with mp.workdps(60):
        largest = ((sqrt(mpf(2)) - 1) / (sqrt(mpf(2)) + 1)) ** 2
        return {
            "COS": fit(lambda z: cos(pi / 2 * sqrt(z)), mpf(1), 9, lambda z: mpf(1)),
            "SIN": fit(lambda z: sin(pi / 2 * sqrt(z)) / sqrt(z), mpf(1), 9, sqrt),
            "LOG": fit(  # 2 artanh f = ln((1 + f) / (1 - f))
                lambda t: (log((1 + sqrt(t)) / (1 - sqrt(t))) / sqrt(t) - 2) / t,
                largest,
                7,
                lambda t: t,
            ),
        }


if __name__ == "__main__":
    for name, numbers in coefficients().items():
        print(name, "=", numbers)
