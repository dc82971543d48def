import gc
import sys
import weakref

import pytest

from fedtorch.process import Unsearched, command


class Cycle:
    """Holds itself: nobody but the collector lets go of it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture
def searched():
    """No search but those that are asked for: how many of each generation there were."""
    gc.collect()
    counts = []

    def told(phase, info):
        if phase == "start":
            counts.append(info["generation"])

    gc.callbacks.append(told)
    yield counts
    gc.callbacks.remove(told)


def test_nobody_looks_for_garbage_while_modules_are_read(searched):
    with pytest.raises(ValueError), Unsearched():
        kept = [[] for _ in range(100_000)]
        assert not gc.isenabled() and gc.get_count()[0] > len(kept)
        raise ValueError
    assert gc.isenabled() and searched == []
    assert gc.get_count()[0] < 1000  # they are old, and nobody looked at them
    assert gc.get_freeze_count() == 0


def test_garbage_from_before_and_from_within_is_found_by_the_next_whole_search():
    before = Cycle()
    with Unsearched():
        within = Cycle()
        seen = weakref.ref(before), weakref.ref(within)
        del before
    del within
    assert all(s() for s in seen)
    gc.collect()
    assert not any(s() for s in seen)


def test_who_switched_the_search_off_or_froze_memory_finds_it_so():
    gc.disable()
    with Unsearched():
        pass
    still = gc.isenabled()
    gc.enable()
    assert not still
    gc.freeze()
    frozen = gc.get_freeze_count()
    with Unsearched():
        young = [[]]
    after = gc.get_freeze_count()
    gc.unfreeze()
    assert after == frozen > 0 and young


def test_one_within_another_changes_nothing():
    with Unsearched():
        with Unsearched():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


def test_what_a_command_reads_is_never_searched_again_and_its_garbage_goes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command()
    lost = Cycle()
    seen = weakref.ref(lost)
    del lost
    with Unsearched():
        assert seen() is None
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert frozen > 10_000
