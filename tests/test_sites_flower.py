"""Engine flower as options: what cannot be reached or told apart is refused before anything begins."""

import sys
import warnings

import pytest

from fedtorch import Local
from fedtorch.data.base import facts_of
from fedtorch.run import objects
from fedtorch.secure.aggregator import Secure
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.flower import Flower
from fedtorch.sites.offer import Plan
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.types import ConfigError

HERE = {"address": "127.0.0.1:8000"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "must be HOST:PORT"),
        ({"address": "nowhere"}, "must be HOST:PORT"),
        ({"address": "127.0.0.1:99999"}, "must be HOST:PORT"),
        ({"address": "fed.example.org:8000"}, "without engine.ca only this machine"),
        (HERE | {"nodes": ["north"]}, "NAME=NODE"),
        (HERE | {"nodes": ["north=1", "north=2"]}, "twice"),
        (HERE | {"nodes": ["north=1", "south=1"]}, "twice"),
    ],
    ids=["none", "no-port", "port", "far", "pair", "name-twice", "node-twice"],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        Flower(**given)


def test_an_authority_without_a_certificate_is_named_by_its_option(tmp_path):
    pytest.importorskip("flwr.app", reason="the extra flower is not installed")
    (tmp_path / "ca.pem").write_text("hello")
    with pytest.raises(ConfigError, match=r"engine.ca: .*ca.pem holds no certificate"):
        Flower(**HERE, ca=str(tmp_path / "ca.pem")).door()


def test_it_is_given_by_name_and_pins_nodes():
    made = objects.choose("engine", {"name": "flower", **HERE, "nodes": "north=12,south=7"})
    assert made == Flower(**HERE, nodes=["north=12", "south=7"])
    assert made.pinned() == {"north": 12, "south": 7}


def test_flower_takes_the_place_of_keys_and_of_no_other_engine():
    site = {"name": "north", "engine": Flower(**HERE)}
    assert SiteConfig(**site).engine == Flower(**HERE)
    for more in ({"credentials": "keys"}, {"insecure": True}):
        with pytest.raises(ConfigError, match="Flower decides who is whom"):
            SiteConfig(**site, **more)
    with pytest.raises(ConfigError, match="local is an engine of fedtorch train"):
        SiteConfig(name="north", engine=Local())
    with pytest.raises(ConfigError, match="--credentials FOLDER"):
        SiteConfig(name="north")
    serve = {"sites": ["north"], "input_shape": [3], "engine": Flower(**HERE)}
    assert ServeConfig(**serve).engine == Flower(**HERE)


def test_a_run_in_one_place_is_told_where_sites_are():
    with pytest.raises(ConfigError, match="fedtorch serve --engine flower"):
        Flower(**HERE).open(None, [], None)


def test_sums_under_masks_are_refused_as_flower_shows_no_certificates():
    facts = facts_of((3,), 2, "classification")
    plan = Plan(run="r", model="logistic", aggregator=Secure(), facts=facts, batch_size=8)
    model, recipe = plan.build()
    engine = Sites(plan=plan, flower=Flower(**HERE))
    with pytest.raises(ConfigError, match="certificates of their own"):
        engine.open(model, remotes(["a", "b", "c"]), recipe)


def test_files_that_are_not_there_and_names_without_a_node_are_said(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Flower imports warns of itself
        pytest.importorskip("fedtorch.sites.relay", reason="the extra flower is not installed")
    with pytest.raises(ConfigError, match=r"engine\.ca cannot be read"):
        Flower(**HERE, ca=str(tmp_path / "ca.pem")).door()
    with pytest.raises(ConfigError, match="at which node 'south' is"):
        Flower(**HERE, nodes=["north=1"]).listen(1, lambda *_: b"", ["north", "south"])


def test_without_flower_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fedtorch.sites.relay", None)
    monkeypatch.delattr("fedtorch.sites.relay", raising=False)
    with pytest.raises(ConfigError, match=r"fedtorch\[flower\]"):
        Flower(**HERE).listen(1, lambda *_: b"", ["north"])
