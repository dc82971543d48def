import torch

from fedtorch.fast.layers import Rule
from fedtorch.fast.memory import Memory
from fedtorch.fast.private import Flat
from fedtorch.fast.reader import Linear


def flat(memory: Memory) -> Flat:
    torch.manual_seed(0)
    state = {"w": torch.randn(3, 5), "b": torch.randn(3)}
    made = Flat([Linear("w", "b", (3, 5))], (), state, Rule(0.1), {}, (memory, 4))
    made.leaf.value.add_(torch.randn(4, 18))
    return made


def test_changes_are_those_of_the_copies_and_a_client_of_weight_0_may_hold_nan():
    made, weight = flat(Memory()), torch.tensor([0.5, 0.0, 0.25, 0.25])
    change = made.leaf.value - made.leaf.start
    made.leaf.value[1, 4] = float("nan")
    norms = made.sq_norms()
    assert norms.isnan().tolist() == [False, True, False, False]
    torch.testing.assert_close(norms[2], change[2].double().square().sum(), rtol=1e-5, atol=0)
    assert float(made.sq_norms(upper=True)[2]) >= float(change[2].double().square().sum())
    total = made.weighted_sum(weight, exact=True)
    torch.testing.assert_close(total["w"].flatten(), (weight @ change)[:15])
    torch.testing.assert_close(total["b"], (weight @ change)[15:])
    assert torch.equal(made.stack()["b"], made.leaf.value[:, 15:])


def test_a_later_visit_leaves_what_is_still_held_alone():
    memory = Memory()
    weights = flat(memory).stack()["w"]
    before = weights.clone()
    flat(memory)
    assert torch.equal(weights, before)
