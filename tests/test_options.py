"""Options: by name alone."""

from collections.abc import Callable
from typing import Any

import pytest

from fedtorch import (
    Everyone,
    FedAvg,
    FedProx,
    Poisson,
    Recipe,
    Scaffold,
    Server,
    ServerAdam,
    Uniform,
)
from fedtorch.data import Csv, Digits, Dirichlet, HuggingFace, Idx, Npz, QuantitySkew, Shards, Text
from fedtorch.engines import Local, Processes, Ray
from fedtorch.optimizers import ServerAdagrad, ServerSGD, ServerYogi
from fedtorch.privacy import AdaptiveClip, Bands, ClientLevel, LocalDP, SampleLevel
from fedtorch.schedules import Cosine, Exponential, Step
from fedtorch.sites.engine import Sites
from fedtorch.sites.serve import ServeConfig
from fedtorch.sites.site import SiteConfig
from fedtorch.tracking import TensorBoard
from train import Config

BY_NAME = [
    *(SampleLevel, ClientLevel, LocalDP, AdaptiveClip, Bands),
    *(FedAvg, FedProx, Scaffold, ServerSGD, ServerAdam, ServerYogi, ServerAdagrad),
    *(Everyone, Uniform, Poisson, Exponential, Step, Cosine),
    *(Local, Processes, Ray, Sites, Dirichlet, Shards, QuantitySkew, Digits, TensorBoard),
    *(Config, SiteConfig, ServeConfig),
]
FIRST_BY_PLACE = [Csv, Npz, Idx, Text, HuggingFace]


@pytest.mark.parametrize("options", BY_NAME)
def test_no_option_goes_by_its_place(options: Callable[..., Any]) -> None:
    # SampleLevel(3) looked like an epsilon and was the clipping norm
    with pytest.raises(TypeError, match="positional"):
        options(1)


@pytest.mark.parametrize("options", FIRST_BY_PLACE)
def test_a_data_set_takes_its_path_by_place_and_no_more(options: Callable[..., Any]) -> None:
    assert options("here").path == "here"
    with pytest.raises(TypeError, match="positional"):
        options("here", "there")


def test_a_recipe_and_a_server_take_what_they_are_named_for() -> None:
    with pytest.raises(TypeError, match="positional"):
        Recipe(FedAvg(), None)  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        Server(None, [], Recipe(), Everyone())  # type: ignore[misc, arg-type]
