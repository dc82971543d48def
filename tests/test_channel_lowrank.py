"""Matrices as products of thin ones, each from the last."""

import pytest
import torch

from fedtorch import ConfigError, PowerSGD
from fedtorch.channel.base import Turn
from fedtorch.channel.lowrank import LEFT, RIGHT, WHOLE, orthogonal

M = torch.zeros(1, 3, 3, dtype=torch.float64)
M[0, :2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
SENT = {"w": M, "b": torch.tensor([[0.1, 0.2]], dtype=torch.float64)}
LIKE = {k: v[0] for k, v in SENT.items()}


def test_one_step_by_hand():
    """From q = (1, 0): P (.316228, .948683), Q (3.162278, 4.427189), the product ((1, 1.4), (3, 4.2))."""
    stage = PowerSGD(rank=1)
    turn = Turn(0, (0,), {RIGHT + "w": torch.tensor([[[1.0], [0.0], [0.0]]])})
    code = stage.coded(SENT, turn)
    assert sorted(code) == [LEFT + "w", RIGHT + "w", WHOLE + "b"]
    assert all(v.dtype == torch.float32 for v in code.values())
    assert code[LEFT + "w"].flatten().tolist() == pytest.approx([0.316228, 0.948683, 0], abs=1e-6)
    assert code[RIGHT + "w"].flatten().tolist() == pytest.approx([3.162278, 4.427189, 0], abs=1e-6)
    back = stage.decoded(code, LIKE, Turn())
    wanted = torch.tensor([[1, 1.4, 0], [3, 4.2, 0], [0, 0, 0]]).double()
    assert torch.allclose(back["w"][0], wanted, atol=1e-6)
    assert torch.allclose(back["b"], SENT["b"])
    assert stage.kept(code).keys() == stage.first(LIKE).keys() == {RIGHT + "w"}


def test_going_on_from_the_last_code_comes_near_the_best_of_that_rank():
    g = torch.Generator().manual_seed(3)
    matrix = torch.randn(1, 12, 10, generator=g).double()
    s = torch.linalg.svdvals(matrix[0])
    best = float(s[2:].square().sum().sqrt())
    stage, sent = PowerSGD(rank=2), {"w": matrix}
    memory = {n: z[None] for n, z in stage.first({"w": matrix[0]}).items()}
    errors = []
    for _ in range(40):
        code = stage.coded(sent, Turn(1, (0,), memory))
        memory = stage.kept(code)
        errors.append(float((stage.decoded(code, {"w": matrix[0]}, Turn())["w"] - matrix).norm()))
    assert errors[0] > 1.02 * best and errors[-1] == pytest.approx(best, rel=1e-3)


def test_an_update_of_zeros_does_not_end_what_is_sent_for_ever():
    stage, zeros = PowerSGD(rank=1), {"w": torch.zeros_like(M)}
    memory = {n: z[None] for n, z in stage.first({"w": M[0]}).items()}
    none = stage.coded(zeros, Turn(1, (0,), memory))
    assert not any(v.any() for v in none.values())
    later = stage.coded({"w": M}, Turn(2, (0,), stage.kept(none)))
    assert later[RIGHT + "w"].any()


def test_columns_are_orthonormal_and_one_that_others_make_up_is_zero():
    columns = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    columns[1, :, 2] = columns[1, :, 0] - 2 * columns[1, :, 1]
    found = orthogonal(columns)
    gram = found.mT @ found
    assert torch.allclose(gram[0], torch.eye(3).double(), atol=1e-12)
    assert torch.allclose(gram[1], torch.diag(torch.tensor([1.0, 1.0, 0.0])).double(), atol=1e-12)


def test_what_would_be_no_smaller_is_sent_whole():
    small = {"w": torch.randn(2, 2, 3).double(), "s": torch.randn(2).double()}
    assert sorted(PowerSGD(rank=2).coded(small, Turn())) == [WHOLE + "s", WHOLE + "w"]
    with pytest.raises(ConfigError, match=r"channel\.rank must be at least 1"):
        PowerSGD(rank=0)
