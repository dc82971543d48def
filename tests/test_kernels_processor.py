import platform

import numpy as np
import pytest

from fedtorch.kernels import processor


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
    processor.features.cache_clear()
    try:
        assert (processor.converts(), processor.wide_cipher()) == (converts, wide)
    finally:
        processor.features.cache_clear()


def test_numpy_tells_what_this_processor_has():
    assert processor.features() or platform.machine() not in ("x86_64", "AMD64")
