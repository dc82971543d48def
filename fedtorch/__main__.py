"""The ``fedtorch`` command: ``train``, ``models``; the same as ``python -m fedtorch``."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import fedtorch
from fedtorch import zoo

USAGE = """usage: fedtorch COMMAND [options]

  train     train a model over many clients (fedtorch train --help)
  models    the models that --model can name
  version   the version installed"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 2 for one that does not exist."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help", "help"):
        print(USAGE)
    elif command == "version":
        print(fedtorch.__version__)
    elif command == "models":
        print("\n".join(zoo.names()))
    elif command == "train":
        return int(train_module().main(rest))
    else:
        print(
            f"fedtorch: unknown command {command!r}; there are train, models, version",
            file=sys.stderr,
        )
        return 2
    return 0


def train_module() -> ModuleType:
    """train.py: inside the package in a wheel, beside it in a checkout."""
    here = Path(__file__).parent
    path = next(p for p in (here / "train.py", here.parent / "train.py") if p.is_file())
    spec = importlib.util.spec_from_file_location("fedtorch.train", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["fedtorch.train"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(main())
