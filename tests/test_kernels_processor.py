import platform

import numpy as np
import pytest
import torch
from torch import nn

from fedtorch import Client, Local, Recipe, Server
from fedtorch.engines import solver_choice
from fedtorch.kernels import processor


def forget():
    processor.features.cache_clear()
    processor.converts.cache_clear()


@pytest.mark.parametrize(
    ("machine", "found", "converts", "wide"),
    [
        ("x86_64", ["X86_V3", "X86_V4", "AVX512_ICL"], True, True),
        ("AMD64", ["AVX2", "AVX512F", "AVX512_SKX"], True, False),
        ("x86_64", ["X86_V3"], False, False),
        ("aarch64", ["ASIMDHP"], True, False),
    ],
    ids=["ice-lake", "skylake-x-numpy-1", "zen-3", "arm"],
)
def test_ways_are_chosen_by_what_the_processor_has(machine, found, converts, wide, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(np, "show_config", lambda mode: {"SIMD Extensions": {"found": found}})
    forget()
    try:
        assert (processor.converts(), processor.wide_cipher()) == (converts, wide)
    finally:
        forget()


def test_numpy_tells_what_this_processor_has():
    assert processor.features() or platform.machine() not in ("x86_64", "AMD64")


@pytest.mark.parametrize(
    ("machine", "used", "told", "has"),
    [
        ("x86_64", "AVX512", {"avx512_bf16": True}, True),
        ("x86_64", "AVX2", {"avx512_bf16": True}, False),
        ("x86_64", "AVX512", {"avx512_f": True}, False),
        ("arm64", "DEFAULT", {"bf16": True}, True),
    ],
    ids=["sapphire-rapids", "switched-off", "skylake-x", "arm"],
)
def test_bf16_is_emulated_where_torch_has_no_instruction(machine, used, told, has, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    assert processor.multiplies_bf16() == has


def test_a_run_in_bf16_is_told_when_it_is_emulated(monkeypatch):
    for has in (True, False):
        monkeypatch.setattr(solver_choice, "multiplies_bf16", lambda has=has: has)
        data = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        server = Server(nn.Linear(3, 2), [Client("a", data)], Recipe(), engine=Local(dtype="bf16"))
        assert (solver_choice.EMULATED in server.notes) != has
