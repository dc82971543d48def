from fedtorch import ClientOptimizer, Recipe
from fedtorch.commands.train import train_module
from fedtorch.options import TrainingOptions
from fedtorch.privacy import SampleLevel
from fedtorch.sites.offer import Plan
from fedtorch.sites.options import ServeConfig
from fedtorch.training.losses import LOSSES

Config = train_module().Config


def test_recipes_configs_and_offers_have_one_set_of_defaults():
    serve = ServeConfig(sites=["a"], input_shape=[1], insecure=True)
    owners = (TrainingOptions(), Recipe(), Config(), serve, Plan("r"))
    assert len({tuple(o.training().items()) for o in owners}) == 1


def test_a_recipe_has_what_the_config_says():
    own = {"lr": 0.3, "epochs": 3, "steps": 2, "batch_size": 5, "drop_last": True}
    own |= {
        "accumulate": 2,
        "clip_norm": 1.5,
        "lr_warmup": 1,
        "lr_decay": "linear",
        "lr_floor": 0.2,
    }
    plan = SampleLevel(noise_multiplier=1.0)
    config = Config(**own, rounds=7, privacy=plan, optimizer="adam", optimizer_args={"eps": 1e-3})
    recipe = config.recipe(LOSSES["mse"])
    assert recipe.training() == own and recipe.loss is LOSSES["mse"]
    assert recipe.optimizer == ClientOptimizer("adam", {"eps": 1e-3})
    assert recipe.privacy == plan.planned_for(7) and recipe.privacy.rounds == 7
