"""Two processes of one site are told from one that was started again, and the later one is turned away."""

import threading

from fedtorch.sites.callers import MOST, Callers, new_process
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError
from test_sites import folder as folder  # a fixture
from test_sites import offer, server, site_config


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_site_that_is_started_again_takes_the_place_of_the_one_that_died():
    callers, first, second = Callers(60), new_process(), new_process()
    assert not any(map(callers.turned_away, (first, first, second, second, second)))


def test_the_later_of_two_that_live_is_turned_away_for_good():
    callers, first, second, third = Callers(60), *(new_process() for _ in range(3))
    assert not any(map(callers.turned_away, (first, second, third, first)))
    assert [*map(callers.turned_away, (second, third, first, second))] == [True, True, False, True]


def test_who_was_silent_too_long_has_lost_its_place():
    clock = Clock()
    callers, first, second = Callers(60, clock), new_process(), new_process()
    assert not callers.turned_away(first)
    clock.now = 61.0
    assert not callers.turned_away(second)
    assert not callers.turned_away(first)  # it slept, and is the later one now
    assert not callers.turned_away(second)
    assert callers.turned_away(first)


def test_what_says_no_process_is_not_looked_at_and_nobody_fills_the_memory():
    callers = Callers(60)
    assert not any(callers.turned_away(odd) for odd in (None, 3, "x", [], "g" * 16, "0" * 17))
    assert not callers.heard
    for _ in range(3 * MOST):
        callers.turned_away(new_process())
    assert len(callers.heard) == MOST


def test_two_processes_of_one_site_with_a_state_folder_each_are_noticed(folder, tmp_path, caplog):
    with server(folder, offer(), minimum=2) as there:
        port = there.session.port
        made = [Site(site_config(folder, port, "north", tmp_path / s)) for s in ("one", "two")]
        ends = {}

        def work(site):
            try:
                site.run()
            except ConfigError as e:
                ends[site] = str(e)

        for site in made:
            run = threading.Thread(target=work, args=[site])
            run.start()
            while site.plan is None:  # it has called once
                there.session.wait_for_sites(0.01)
            if site is made[1]:
                run.join(30)
        assert [*ends] == [made[1]] and "another process calls as north" in ends[made[1]]
        assert "turned away a second process of north" in caplog.text
        there.session.ended = ""
        there.close()
    for site in made:
        site.close()
