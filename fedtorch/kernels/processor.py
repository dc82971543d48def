"""What this processor can do, where it decides which of two ways to the same numbers is the faster one."""

import platform
from functools import cache

import numpy as np


@cache
def features() -> frozenset[str]:
    """Groups of instructions, by NumPy's names: those the processor has and nobody switched off."""
    found = np.show_config(mode="dicts")
    return frozenset(found.get("SIMD Extensions", {}).get("found", ()))


def converts() -> bool:
    """Whether whole numbers of 64 bits become floating point by one instruction for several of them.

    Of Intel's and AMD's processors those with AVX-512 (called X86_V4 since NumPy 2.4); ARM always has it.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
    return not x86 or not features().isdisjoint(("X86_V4", "AVX512_SKX"))


def wide_cipher() -> bool:
    """Whether one instruction encrypts four blocks of AES: since Intel's Ice Lake and AMD's Zen 4."""
    return "AVX512_ICL" in features()
