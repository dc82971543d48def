import pytest
import torch

from fedtorch.fast.layers import Leaf, Rule
from fedtorch.fast.memory import Memory
from fedtorch.fast.private import Flat
from fedtorch.fast.reader import Linear
from fedtorch.privacy.canaries import Gauge, Watch, watched
from fedtorch.privacy.gradients import PrivateSteps
from fedtorch.privacy.noise.streams import stream


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


def test_a_step_of_a_gradient_and_no_more_can_be_taken_by_whoever_noises_it():
    weights = torch.randn(3, 5)
    leaf, other = (Leaf(torch.zeros(5), 0, Rule(0.1), None, weights.clone()) for _ in range(2))
    gradient = torch.randn(5)
    to, factor = leaf.plain(1, 0.25)
    to.add_(gradient, alpha=factor)
    other.move(gradient[None], slice(1, 2), 0.25)
    assert torch.equal(leaf.value, other.value) and not torch.equal(leaf.value, weights)


@pytest.mark.parametrize("more", [{"momentum": 0.9}, {"decay": 0.1}, {"pull": 0.1}, {}])
def test_a_step_of_more_than_the_gradient_cannot(more):
    shift = None if more else torch.ones(3, 5)
    assert (
        Leaf(torch.zeros(5), 0, Rule(0.1, **more), shift, torch.zeros(3, 5)).plain(0, 1.0) is None
    )


def test_whole_sums_are_there_for_whoever_looks_at_them():
    kept = {"at": torch.tensor([2]), "numbers": torch.tensor(5), "inside": torch.tensor([True])}
    watch = Watch(kept, torch.tensor([[0]]))
    plain = PrivateSteps(1.0, 2.0, 1.0, [stream("aes", 7, "noise")])
    gauge = Gauge.new()
    for private in (watched(plain, [watch]), PrivateSteps(1.0, 2.0, 1.0, [gauge])):
        row, weights = torch.full((5,), 0.5), torch.zeros(5)
        assert not private.noisy(row, 0, onto=(weights, -0.1))
        assert not weights.any()
    assert watch.steps == 1 and watch.moved[0, 0] != 0 and gauge.lengths
    row = torch.zeros(5)
    assert not plain.noisy(row, 0, part=True, onto=(weights, -0.1)) and not weights.any()
    assert plain.noisy(row, 0, onto=(weights, -0.1)) and weights.all()
