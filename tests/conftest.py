"""What many tests need: small unequal clients, a small model, and the command run in this process."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from fedtorch import Client, Observer, Server
from fedtorch.__main__ import main
from fedtorch.types import Released

# tests talk to nobody: Hugging Face's libraries read this once, whoever imports them first
os.environ["HF_HUB_OFFLINE"] = "1"

# on a busy machine two threads wait for each other at every small operation, a hundred times longer than
# the operation takes
torch.set_num_threads(1)

# machines that test are busy: how long an example takes says nothing
settings.register_profile(
    "busy", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("busy")


FIRST = (
    "engines_ray", "checks_combination", "sites", "sites_superlink", "notebooks", "fast_devices",
    "engines_processes", "privacy_nvflare", "hospitals", "train", "privacy_run", "resume", "fast_dropout",
)  # fmt: skip
"""Files that take longest: one of them at the end would leave the other processes waiting for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.fixture(autouse=True)
def workers_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of tests are small, and would all stay in one process."""
    monkeypatch.setattr("fedtorch.engines.workers.worth.SHARED", 0.0)


SHARED = Path(__file__).parents[2] / "shared" / "data"


def make_clients(sizes: Sequence[int], features: int = 6, classes: int = 4) -> list[Client]:
    g = torch.Generator().manual_seed(0)
    return [
        Client(
            f"c{k}",
            (torch.randn(n, features, generator=g), torch.randint(0, classes, (n,), generator=g)),
        )
        for k, n in enumerate(sizes)
    ]


def mlp(features: int = 6, classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(features, 12), nn.Tanh(), nn.Linear(12, classes))


def watched(server: Server) -> list[Released]:
    """All that clients send from now on."""
    seen: list[Released] = []

    class Watch(Observer):
        def sent(self, released: Released) -> None:
            seen.append(released)

    server.observers.append(Watch())
    return seen


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.fixture(autouse=True)
def state(tmp_path_factory, monkeypatch) -> Path:
    """Where it is kept which runs are this user's own: a new place for each test."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    monkeypatch.delenv("COLUMNS", raising=False)  # GNU readline hands it to every child
    return folder


@pytest.fixture
def fedtorch(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """``fedtorch("train", ...)`` in a new folder -> exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            torch.set_num_threads(threads)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the shared data is not here: {SHARED}")
    return SHARED
