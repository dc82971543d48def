import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from conftest import make_clients
from fedtorch import Local, Recipe, Server, seeds

ONE_BY_ONE = Local(solver="general")


def test_derived_seeds_are_stable_across_versions_and_processes():
    # a changed value here would break every resumed run
    assert seeds.derive(0, "order", 3, "client 7") == 8390484394486290870
    assert seeds.derive(0, "cohort", 1) != seeds.derive(0, "cohort", 2)
    assert seeds.derive(0, "cohort", 1) != seeds.derive(1, "cohort", 1)
    assert seeds.derive(0, 1, "1") != seeds.derive(0, "1", 1)
    assert all(0 <= seeds.derive(s, "x") < 2**63 for s in range(100))


def test_seeded_repeats_and_puts_the_global_generators_back():
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    before = random.getstate(), np.random.get_state()[1].copy()
    with seeds.seeded(1):
        first = draw()
    with seeds.seeded(1):
        assert draw() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()


def test_no_seed_is_queued_for_an_accelerator_that_is_not_in_use(monkeypatch):
    called = []
    monkeypatch.setattr(torch, "manual_seed", called.append)
    for in_use in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda in_use=in_use: in_use)
        seeds.set_global(3)
        assert called == [3] * in_use


def test_kept_spans_many_seeds():
    state = torch.get_rng_state()
    with seeds.kept():
        seeds.set_global(1)
        first = torch.rand(3)
        seeds.set_global(2)
        assert not torch.equal(torch.rand(3), first)
        seeds.set_global(1)
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_in_two_threads_draw_what_each_draws_alone():
    def run(seed):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 10)
        )
        return Server(model, make_clients([9, 7]), Recipe(epochs=30), seed=seed, engine=ONE_BY_ONE)

    def train(server):
        for _ in range(2):
            server.round()
        return server.model[0].weight.detach().clone()

    alone = [train(run(seed)) for seed in range(2)]
    servers = [run(seed) for seed in range(2)]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(train, servers))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_seeds_are_derived_once_and_only_where_somebody_looks():
    made = []

    def make():
        made.append(1)
        return 5, 6, 7

    later = seeds.Later(make, 3)
    assert len(later) == 3 and not made
    assert (*later,) == (5, 6, 7) and later[1] == 6 and later[1:] == (6, 7) and 7 in later
    assert len(made) == 1
