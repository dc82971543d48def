"""Local privacy: noise on each client's own update, for a sensitivity of twice the clip."""

import math

import pytest
import torch
from scipy import stats

from fedtorch import FedAvg
from fedtorch.privacy import LocalDP
from fedtorch.privacy.clipping import joint_norms
from fedtorch.privacy.local import laplace
from fedtorch.privacy.noise.streams import stream
from fedtorch.types import ConfigError, Task
from private_case import clients, flat, model, server, silent, visit


def test_gaussian_noise_has_twice_the_clip_times_the_multiplier():
    who = clients((3,) * 12, 40, 0.0)
    x = flat(visit(silent(), who, LocalDP(clip=0.3, rounds=1), noise=1.5))
    assert x.shape == (12, 2000)
    assert abs(x.std().item() / (2 * 0.3 * 1.5) - 1) < 0.02
    assert (torch.corrcoef(x) - torch.eye(12)).abs().max() < 0.12


def test_laplace_noise_is_laplace():
    who = clients((3,) * 10, 40, 0.0)
    plan = LocalDP(mechanism="laplace", clip=0.3, rounds=1)
    x = flat(visit(silent(), who, plan, noise=1.5))
    assert stats.kstest((x / 0.9).flatten().numpy(), "laplace").pvalue > 1e-4


@pytest.mark.parametrize("mechanism, norm", [("gaussian", 13.0), ("laplace", 19.0)], ids=str)
def test_a_client_is_clipped_by_the_norm_that_its_noise_is_for(mechanism, norm):
    """3, -4 and 12 over two groups: 13 by L2, 19 by L1."""
    row = torch.tensor([[3.0, -4.0]]).double()
    sent = {"delta": {"w": row}, "c": {"w": torch.tensor([[12.0]]).double()}}
    task = Task({}, {}, 0, 0, 1.0, {"clip": 1.0, "noise": 0.0})
    out = LocalDP(mechanism=mechanism, rounds=1).client(sent, torch.ones(1), task, ["a"])
    assert torch.allclose(out["delta"]["w"], row / norm) and out["c"]["w"].item() == pytest.approx(
        12 / norm
    )


def test_laplace_draws_have_tails_a_uniform_does_not_have():
    x = laplace(stream("aes", None, "x"), (100_000,))
    assert x.isfinite().all()
    assert x.abs().max() > 8


def test_the_farthest_laplace_draws_are_finite_and_where_53_bits_put_them():
    class Ends:
        def uniform(self, n):
            return torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)

    ends = laplace(Ends(), (2, 2)).flatten() / math.log(2)
    assert ends.tolist() == pytest.approx([-53, -52, 0, 52])


def test_updates_are_clipped_in_the_mechanisms_own_norm():
    from fedtorch.types import Task

    sent = {"delta": {"a": torch.randn(4, 50).double() * 100}}
    for mechanism, order in (("gaussian", 2), ("laplace", 1)):
        plan = LocalDP(mechanism=mechanism, clip=0.7, rounds=1)
        task = Task({}, {}, 0, 0, 0.1, {"clip": 0.7, "noise": 1e-12})
        out = plan.client(sent, torch.ones(4), task, list("abcd"))
        assert torch.allclose(joint_norms(out, order), torch.tensor(0.7).double(), atol=1e-6)


def test_calibration_is_the_analytic_gaussian_over_the_whole_run():
    assert LocalDP(epsilon=1.0, rounds=1).calibrated(1) == pytest.approx(3.730632, rel=1e-5)
    assert LocalDP(epsilon=1.0).calibrated(25) == pytest.approx(5 * 3.730632, rel=1e-5)
    assert LocalDP(epsilon=2.0, mechanism="laplace").calibrated(10) == pytest.approx(5.0)


def test_laplace_costs_add_up_and_delta_is_zero():
    plan = LocalDP(epsilon=2.0, mechanism="laplace", rounds=4)
    private = server(model(), clients(), plan)
    private.round()
    assert private.private.spent() == pytest.approx(0.5)
    assert private.private.delta == 0


def test_an_update_that_is_not_finite_is_sent_as_noise():
    who = clients((5, 5, 5))
    who[1].data.tensors[0].fill_(math.nan)
    private = server(model(), who, LocalDP(clip=0.1, rounds=1))
    figures = private.round()
    assert len(figures["cohort"]) == 3  # who reports tells nothing
    assert all(p.isfinite().all() for p in private.model.parameters())


def test_example_weights_and_unknown_mechanisms_are_refused():
    with pytest.raises(ConfigError, match="weighting examples voids"):
        server(model(), clients(), LocalDP(rounds=1), strategy=FedAvg(weighting="examples"))
    with pytest.raises(ConfigError, match="gaussian or laplace"):
        LocalDP(mechanism="uniform")
