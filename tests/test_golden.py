"""Golden bits: a change of form changes no result."""

import json

import pytest

from tests import golden

KNOWN = json.loads(golden.PLACE.read_text())
RUNS = {name: rest for name, *rest in golden.runs()}


def test_every_run_is_recorded():
    assert [*RUNS] == [*KNOWN["runs"]]


@pytest.mark.parametrize("name", RUNS)
def test_weights_and_figures_are_those_recorded(name):
    found, known = golden.outcome(*RUNS[name]), KNOWN["runs"][name]
    assert found["norm"] == pytest.approx(known["norm"], rel=1e-3)
    assert found["some"] == pytest.approx(known["some"], rel=2e-2, abs=2e-3)
    if golden.machine() == KNOWN["machine"]:
        assert not golden.differ(found, known)
