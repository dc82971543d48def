"""Memory that is lent to one sum after another, and never while somebody holds it."""

import torch

from conftest import make_clients, mlp
from fedtorch import Local, Server
from fedtorch.training.reserve import MOST, Reserve


def test_a_block_is_lent_again_when_nobody_holds_a_view_of_it():
    reserve = Reserve()
    lent = reserve.lend(10)
    place, view = lent.data_ptr(), lent.view(2, 5)[1].detach()
    del lent
    other = reserve.lend(10)
    assert other.data_ptr() != place and other.dtype == torch.float64 and len(other) == 10
    del view
    assert reserve.lend(10).data_ptr() == place
    place = other.data_ptr()
    del other
    assert {reserve.lend(10).data_ptr() for _ in range(3)} <= {place, reserve.lend(10).data_ptr()}


def test_few_blocks_are_kept_of_one_size_and_none_after_it_is_cleared():
    reserve = Reserve()
    held = [reserve.lend(10).fill_(k) for k in range(MOST + 2)]
    assert len(reserve._kept) == MOST and len({h.data_ptr() for h in held}) == MOST + 2
    small = reserve.lend(4)
    assert len(small) == 4 and len(reserve._kept) == 1
    reserve.clear()
    assert not reserve._kept and all((h == k).all() for k, h in enumerate(held))


def test_rounds_sum_up_in_one_place_and_leave_a_step_that_is_held_as_it_was():
    server = Server(mlp(), make_clients([9, 5, 7]), engine=Local(solver="general"))
    places = [where(server) for _ in server.rounds(3)]
    assert len({*places}) == 1
    held = {**server.last_step}
    before = {k: v.clone() for k, v in held.items()}
    assert all(where(server) != places[0] for _ in server.rounds(2))
    assert all(torch.equal(v, before[k]) for k, v in held.items())
    server.close()
    assert not server.session.reserve._kept


def where(server: Server) -> int:
    """Where the sum of the last round lies."""
    return min(v.data_ptr() for v in server.last_step.values())
