"""``fedtorch train`` is train.py, wherever it stands."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType


def main(argv: Sequence[str]) -> int:
    """Train a model over many clients."""
    return int(train_module().main(argv))


def train_module() -> ModuleType:
    """train.py: inside the package in a wheel, beside it in a checkout."""
    if "fedtorch.train" in sys.modules:
        return sys.modules["fedtorch.train"]
    package = Path(__file__).parent.parent
    path = next(p for p in (package / "train.py", package.parent / "train.py") if p.is_file())
    spec = importlib.util.spec_from_file_location("fedtorch.train", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["fedtorch.train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
