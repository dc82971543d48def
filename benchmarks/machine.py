"""What the processor can do, what of it is used, and by what variables the rest is switched off."""

import os
import platform
from pathlib import Path

import numpy as np
import torch

from fedtorch.kernels.compile import available

TOLD = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "amx_bf16",
    "vaes",
    "asimd",
    "aes",
    "bf16",
    "sve",
)
"""Features that decide speeds here, as Linux names them."""
SWITCHES = (
    "ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES", "NPY_DISABLE_CPU_FEATURES", "OPENSSL_ia32cap", "NUMBA_DISABLE_JIT",
)  # fmt: skip


def machine() -> str:
    """In three lines."""
    about = _about()
    name = about.get("model name") or platform.processor() or platform.machine()
    flags = (about.get("flags") or about.get("Features") or "").split()
    has = " ".join(f for f in TOLD if f in flags) or "not known"
    off = " ".join(f"{k}={os.environ[k]}" for k in SWITCHES if k in os.environ)
    return "\n".join(
        (
            f"{name}, {os.cpu_count()} cores, one thread; it has {has}",
            f"torch {torch.__version__} uses {torch.backends.cpu.get_cpu_capability()}, "
            f"NumPy {np.__version__}, compiled loops {_loops()}",
            f"switched off by {off}" if off else "nothing is switched off",
        )
    )


def _about() -> dict[str, str]:
    """The first processor of Linux's list."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    pairs = (line.partition(":") for line in lines)
    return {k.strip(): v.strip() for k, _, v in reversed([*pairs])}


def _loops() -> str:
    """What numba makes machine code for."""
    if not available():
        return "none (no numba)"
    from llvmlite import binding
    from numba.core import config

    given = config.CPU_FEATURES
    told = given if given is not None else binding.get_host_cpu_features().flatten()
    wide = "AVX-512" if "+avx512f" in told else "AVX2" if "+avx2" in told else "neither AVX"
    return f"for {config.CPU_NAME or binding.get_host_cpu_name()} ({wide})"
