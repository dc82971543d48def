import pickle

import pytest
import torch

from fedtorch.fast import memory
from fedtorch.fast.memory import Memory

START = torch.arange(5.0)


def test_the_same_memory_is_lent_again_but_never_twice():
    kept = Memory()
    rows = kept.rows(START, 3)
    assert rows.shape == (3, 5) and bool((rows == START).all())
    place, part = rows.data_ptr(), rows[1].view(5, 1)
    rows.add_(1)
    del rows
    other = kept.rows(START, 3)  # a view of a row is enough to keep it
    assert other.data_ptr() != place and torch.equal(part[:, 0], START + 1)
    del part, other
    again = kept.rows(START, 2)
    assert again.data_ptr() == place and bool((again == START).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("room", [1 << 20, 0])
def test_rows_begin_with_a_cache_line_where_memory_is_kept(room, dtype, monkeypatch):
    monkeypatch.setattr(memory, "MEMORY_KEPT", room)
    kept = Memory()
    rows = kept.rows(START.to(dtype), 3)
    assert rows.dtype == dtype and bool((rows == START).all())
    assert rows.stride(0) * rows.element_size() % memory.LINE == 0
    assert kept.busy() == bool(room)
    if room:
        assert rows.data_ptr() % memory.LINE == 0


def test_aligned_memory_grows_with_what_is_asked_for():
    kept = Memory()
    kept.rows(START, 1)
    rows = kept.rows(START, 40)
    assert bool((rows == START).all()) and kept.busy()
    assert bool((kept.rows(START[:0], 4) == 0).all())


def test_a_worker_has_its_own():
    kept = Memory()
    rows = kept.rows(START, 3)
    assert not pickle.loads(pickle.dumps(kept)).busy() and kept.busy()
    assert rows.shape == (3, 5)


def test_rows_of_no_numbers_and_no_rows_are_lent():
    assert Memory().rows(START[:0], 4).shape == (4, 0)
    assert Memory().rows(START, 0).shape == (0, 5)
