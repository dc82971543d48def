"""What this processor can do, where it decides which of two ways to the same numbers is the faster one."""

import platform
from functools import cache
from typing import Any

import numpy as np
import torch

X86 = "x86_64", "amd64", "i386", "i686"


@cache
def features() -> frozenset[str]:
    """Groups of instructions, by NumPy's names: those the processor has and nobody switched off."""
    found = np.show_config(mode="dicts")
    return frozenset(found.get("SIMD Extensions", {}).get("found", ()))


def x86() -> bool:
    """Whether Intel or AMD made it, or might have."""
    return platform.machine().lower() in X86


@cache
def converts() -> bool:
    """Whether whole numbers of 64 bits become floating point by one instruction for several of them.

    Of Intel's and AMD's processors those with AVX-512 (called X86_V4 since NumPy 2.4); ARM always has it.
    """
    return not x86() or not features().isdisjoint(("X86_V4", "AVX512_SKX"))


def wide_cipher() -> bool:
    """Whether one instruction encrypts four blocks of AES: since Intel's Ice Lake and AMD's Zen 4."""
    return "AVX512_ICL" in features()


def multiplies_bf16() -> bool:
    """Whether it multiplies numbers in bfloat16, and torch uses that: else it is emulated."""
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not told:  # before torch 2.11
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not x86():
        return bool(told.get("bf16"))
    wide = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
    return wide and bool(told.get("avx512_bf16") or told.get("amx_bf16"))
