"""A site whose model file is another than the server's is told so, also where the weights fit."""

import pytest
import torch
from torch import nn

from fedtorch.run import zoo
from fedtorch.sites import alike
from fedtorch.sites.visits import other_version
from fedtorch.types import ConfigError


def net(between=nn.ReLU, width=5, **more):
    return nn.Sequential(nn.Flatten(), nn.Linear(6, width), between(**more), nn.Linear(width, 3))


class Pools(nn.Module):
    """The same weights, put to another use."""

    def __init__(self, largest):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)
        self.norm, self.largest = nn.BatchNorm1d(5), largest

    def forward(self, x):
        found = self.norm(self.first(x))
        return self.last(found.clamp(min=0) if self.largest else found.abs())


def checked(ours, theirs, shape=(2, 3)):
    alike.check(ours, "net", shape, alike.shown(theirs, shape))


@pytest.mark.parametrize("make", [net, lambda: Pools(True), lambda: net(nn.Dropout)])
def test_the_same_file_gives_the_same_whatever_was_drawn(make):
    shape = (2, 3) if isinstance(make(), nn.Sequential) else (6,)
    ours, theirs = make(), make()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = torch.get_rng_state()
    checked(ours, theirs, shape)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and ours.training


@pytest.mark.parametrize(
    "ours, theirs, shape",
    [
        (net(nn.Tanh), net(), (2, 3)),
        (net(nn.LeakyReLU), net(), (2, 3)),
        (net(nn.ELU), net(nn.SELU), (2, 3)),
        (Pools(True), Pools(False), (6,)),
    ],
)
def test_another_layer_between_the_same_weights_is_refused(ours, theirs, shape):
    with pytest.raises(ConfigError, match=r"model net is another .* makes something else"):
        checked(ours, theirs, shape)


def test_other_weights_are_refused_by_another_sentence():
    for other in (net(width=4), net().double(), nn.Sequential(net())):
        with pytest.raises(ConfigError, match="other names, shapes or types"):
            checked(other, net())


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet", "transformer", "lstm", "bag", "small"])
def test_models_of_the_zoo_are_looked_at_whatever_they_take(name):
    from fedtorch.data.base import facts_of

    shape = (12,) if name in ("transformer", "lstm", "bag") else (1, 28, 28)
    facts = facts_of(shape, 3, "classification") | {"vocab_size": 20}
    told = [alike.shown(zoo.build(name, facts, {}), shape) for _ in range(2)]
    assert told[0]["gives"] and told[0] == told[1]


def test_a_model_that_hangs_on_chance_or_fails_is_known_by_its_layout_alone():
    class Chance(nn.Linear):
        calls = 0

        def forward(self, x):
            Chance.calls += 1
            return super().forward(x) + Chance.calls

    class Fails(nn.Linear):
        def forward(self, x):
            raise KeyError(x)

    for kind in (Chance, Fails):
        assert alike.shown(kind(6, 3), (6,))["gives"] is None
        checked(kind(6, 3), kind(6, 3), (6,))
    assert alike.shown(net(), None)["gives"] is None
    with pytest.raises(ConfigError, match="something else"):  # it fails here alone
        alike.check(Fails(6, 3), "net", (6,), alike.shown(nn.Linear(6, 3), (6,)))


@pytest.mark.parametrize("told", [None, 3, [], {"layout": None}, {"gives": [1.0]}])
def test_what_a_server_says_may_be_anything(told):
    if isinstance(told, dict):
        with pytest.raises(ConfigError, match="another than the server's"):
            alike.check(net(), "net", (2, 3), told)
    else:
        alike.check(net(), "net", (2, 3), told)
    for odd in ("x", [1, 2], [None], [float("inf")] * 6, {}):
        say = {"layout": alike.layout(net()), "gives": odd}
        if isinstance(odd, list) and odd and type(odd[0]) is float:
            with pytest.raises(ConfigError, match="something else"):
                alike.check(net(), "net", (2, 3), say)
        else:
            alike.check(net(), "net", (2, 3), say)


def test_other_versions_are_named():
    from fedtorch import __version__

    assert other_version(None) == other_version(__version__) == ""
    assert other_version("9\n9") == f"the server runs fedtorch '9\\n9', and this site {__version__}"
