"""What a package offers is imported once it is asked for, and is there all the same."""

import ast
import importlib
import pickle
from pathlib import Path

import pytest

import fedtorch

PACKAGES = [
    "",
    ".aggregation",
    ".data",
    ".engines",
    ".privacy",
    ".privacy.accounting",
    ".strategies",
]
PACKAGES += [".tracking"]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_name_that_a_package_offers_is_found_and_listed(name):
    package = importlib.import_module(f"fedtorch{name}")
    assert all(hasattr(package, n) for n in package.__all__)
    assert {*package.__all__} <= {*dir(package)} and "__all__" in dir(package)


def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fedtorch' has no attribute 'FedNothing'"):
        fedtorch.FedNothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'FedNothing'"):
        from fedtorch import FedNothing  # noqa: F401
    assert not hasattr(fedtorch, "__wrapped__")


def test_rooms_are_there_without_an_import_of_their_own():
    assert fedtorch.privacy.sample.SampleLevel is fedtorch.privacy.SampleLevel
    assert fedtorch.strategies.fedprox.FedProx is fedtorch.FedProx


def test_a_function_with_the_name_of_its_module_is_the_function():
    import fedtorch.data.partition  # noqa: F401
    from fedtorch.data import Dirichlet, partition

    assert callable(partition) and Dirichlet.__module__ == partition.__module__


def test_what_is_offered_can_be_pickled():
    assert pickle.loads(pickle.dumps(fedtorch.FedProx(mu=0.1))) == fedtorch.FedProx(mu=0.1)


@pytest.mark.parametrize("old", fedtorch.OLD)
def test_a_module_is_found_by_its_former_name_and_is_the_very_one(old):
    now = importlib.import_module(f"fedtorch.{fedtorch.OLD[old]}")
    assert importlib.import_module(f"fedtorch.{old}") is now
    assert now.__spec__.name == now.__name__ == f"fedtorch.{fedtorch.OLD[old]}"
    assert Path(now.__file__).parent.name != "fedtorch"


def test_what_scripts_took_from_the_solvers_is_there_still():
    from fedtorch.solvers import forward, general, load, snapshot, stacked, to

    from fedtorch.training import module

    assert [module.forward, module.load, module.snapshot, module.to] == [
        forward,
        load,
        snapshot,
        to,
    ]
    assert callable(general) and callable(stacked)


def test_scripts_beside_the_package_import_what_there_is():
    top = Path(__file__).parents[1]
    for path in (
        p for folder in ("benchmarks", "examples", "tools") for p in (top / folder).glob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedtorch"):
                for name in node.names:
                    exec(f"from {node.module} import {name.name}", {})
