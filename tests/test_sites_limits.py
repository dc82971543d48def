"""What a site is asked for: what is named and within its limits; one sentence for the rest."""

import sys
import time

import pytest
from torch import nn

from fedtorch import QSGD, Median, PowerSGD, ServerAdam, TopK
from fedtorch.data.base import facts_of
from fedtorch.privacy import AdaptiveClip, ClientLevel, LocalDP, SampleLevel
from fedtorch.sites import offer as plans
from fedtorch.sites.limits import MOST_LAYERS, accept, model_of_at_most
from fedtorch.sites.options import LIMITS, SiteConfig
from fedtorch.strategies import FedAvg, FedProx, Scaffold
from fedtorch.types import ConfigError

FACTS = facts_of((6,), 3, "classification")
IMAGES = facts_of((1, 8, 8), 2, "classification")
HUGE = 10**400


def site(**changes) -> SiteConfig:
    return SiteConfig(name="north", insecure=True, **changes)


def offer(**changes) -> plans.Plan:
    return plans.Plan(**{"run": "r", "model": "mlp", "facts": FACTS} | changes)


def test_a_class_named_in_a_plan_is_not_imported_here(tmp_path, monkeypatch):
    (tmp_path / "of_a_server.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    table = plans.describe(offer()) | {
        "model_args": {"hidden": {"class_path": "of_a_server.Thing"}}
    }
    with pytest.raises(ConfigError, match="mlp"):
        accept(table, site())
    assert "of_a_server" not in sys.modules


@pytest.mark.parametrize("option", ["step", "eval_step"])
def test_a_step_is_imported_only_where_the_site_has_agreed_to_it(tmp_path, monkeypatch, option):
    (tmp_path / "agreed.py").write_text("def fn(model, batch): return model(batch).sum()")
    monkeypatch.syspath_prepend(tmp_path)
    table = plans.describe(offer(**{option: "agreed:fn"}))
    for own in ({}, {"steps": ["agreed:other"]}):
        with pytest.raises(ConfigError, match=f"does not run {option} 'agreed:fn'.*--steps"):
            accept(table, site(**own))
        assert "agreed" not in sys.modules
    assert getattr(accept(table, site(steps=["agreed:fn"])), option) == "agreed:fn"
    for odd in (["agreed:fn"], {"name": "agreed:fn"}, 7):
        with pytest.raises(ConfigError):
            accept(table | {option: odd}, site(steps=["agreed:fn"]))
    with pytest.raises(ConfigError, match=r"steps must be package\.module:function"):
        site(steps=["agreed.py:fn"])
    sys.modules.pop("agreed", None)


def sample(**changes) -> dict:
    return {"privacy": {"name": "sample", "noise_multiplier": 1.0, "rounds": 3} | changes}


@pytest.mark.parametrize(
    "plan",
    [
        offer(),
        offer(strategy=FedProx(mu=0.1), optimizer_args={"momentum": 0.9}, steps=5, batch_size=None),
        offer(strategy=FedAvg(server=ServerAdam()), model="cnn", facts=IMAGES),
        offer(strategy=Scaffold(), privacy=LocalDP(rounds=3)),
        offer(aggregator=Median(), channel=(TopK(share=0.2, feedback=False),)),
        offer(channel=(PowerSGD(rank=3), TopK(share=0.1), QSGD(levels=3))),
        offer(privacy=SampleLevel(rounds=3)),
        offer(privacy=ClientLevel(rounds=3, adaptive=AdaptiveClip())),
    ],
    ids=lambda p: f"{p.model} {type(p.strategy).__name__} {type(p.privacy).__name__}",
)
def test_an_honest_plan_comes_back(plan):
    assert plans.describe(accept(plans.describe(plan), site())) == plans.describe(plan)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"epochs": 101}, "epochs above this site's max_epochs of 100"),
        ({"epochs": HUGE}, "max_epochs"),
        ({"steps": 10_001}, "max_steps"),
        ({"batch_size": 10_001}, "max_batch"),
        (sample(rounds=2**70), "privacy.rounds above this site's max_rounds"),
        (sample(steps=10**9), "privacy.steps above this site's max_steps"),
        (sample(max_batch=10**9), "privacy.max_batch above this site's max_batch"),
        (sample(batch_size=1e-300), "privacy.batch_size"),
        (sample(batch_size=1e300), "privacy.batch_size"),
        (sample(batch_size="nan"), "batch_size"),
        (sample(clip="nan"), "clip"),
        (sample(noise_multiplier=HUGE), "cannot be built|noise_multiplier"),
        (sample(noise_multiplier=1e200), "noise_multiplier must be at most 1e.09"),
        (sample(statistics_noise=1e200), "statistics_noise must be at most 1e.09"),
        (sample(noise_multiplier=None, epsilon=1e-50), "epsilon must be at least 1e-06"),
        (sample(metrics_epsilon=1e-50), "metrics_epsilon must be at least 1e-06"),
        (sample(delta=1e-320), "delta must be at least 1e-100"),
        (sample(noise_multiplier=-1.0), "noise_multiplier"),
        (sample(delta=0.0), "delta"),
        (sample(sample_rate=1.5), "sample_rate"),
        ({"epochs": -1}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"lr": HUGE}, "cannot be built|lr"),
        ({"lr": "nan"}, "lr"),
        ({"lr": -0.1}, "lr"),
        ({"model": {"name": "mlp", "hidden": 10**12}}, "more than this site's 100,000,000 param"),
        ({"model": {"name": "mlp", "hidden": HUGE}}, "cannot be built"),
        ({"model": {"name": "mlp", "hidden": -1}}, "cannot be built"),
        ({"model": {"name": "resnet", "depth": 10**6}, "facts": IMAGES}, f"{MOST_LAYERS:,} layers"),
        ({"facts": {"input_shape": 6}}, "input_shape"),
        ({"facts": FACTS | {"input_shape": [10**9]}}, "do not belong together: in_features"),
        ({"facts": FACTS | {"in_features": 7}}, "do not belong together: in_features is 7, not 6"),
        ({"facts": FACTS | {"num_classes": HUGE}}, "facts"),
        ({"facts": FACTS | {"num_outputs": 10**9}}, "num_outputs"),
        ({"facts": FACTS | {"vocab_size": 10**9}}, "vocab_size"),
        ({"kind": "ranking"}, "kind"),
        ({"run": "../../etc/x\n\x1b[31m"}, "cannot be called"),
        ({"run": ["r"]}, "run"),
        ({"model": ["mlp"]}, "does not train"),
        ({"loss": {"name": "mse"}}, "no loss"),
        ({"optimizer": None}, "no optimizer"),
        ({"strategy": {"name": {"name": "fedavg"}}}, "no strategy"),
        ({"strategy": {"name": "fedavg", "server": ["x"]}}, "no strategy.server"),
        ({"privacy": [[[[[]]]]]}, "no privacy"),
        ({"aggregator": "torch.nn.Linear"}, "no aggregator"),
        ({"channel": {"name": "torch.nn.Linear"}}, "no channel"),
        ({"channel": {"name": "topk", "share": 2.0}}, "channel.share"),
        ({"channel": [{"name": "topk"}, {"name": "torch.nn.Linear"}]}, "no channel"),
        ({"channel": "topk,torch.nn.Linear"}, "no channel"),
        ({"x" * 10**5: 1}, "no option"),
    ],
    ids=lambda v: str(v)[:60],
)
def test_an_absurd_plan_is_one_sentence(changes, why):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=why) as e:
        accept(plans.describe(offer()) | changes, site())
    assert str(e.value).isprintable() and len(str(e.value)) < 320
    assert time.monotonic() - began < 10


def test_the_owner_sets_the_limits():
    plan = plans.describe(
        offer(epochs=101, privacy=SampleLevel(rounds=20_000, noise_multiplier=9.0))
    )
    wide = accept(plan, site(max_epochs=200, max_rounds=20_000))
    assert wide.epochs == 101 and wide.privacy.rounds == 20_000
    with pytest.raises(ConfigError, match="parameters"):
        accept(plans.describe(offer()), site(max_parameters=100))
    for name in (*LIMITS, "max_epsilon", "max_delta", "patience"):
        for bad in (0, -1, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match=f"{name} must be"):
                site(**{name: bad})


def test_what_just_reaches_a_limit_is_taken():
    assert accept(plans.describe(offer(epochs=100)), site()).epochs == 100
    with model_of_at_most(9):
        nn.Linear(2, 3)
        with pytest.raises(ConfigError, match="more than this site's 9 parameters"):
            nn.Linear(1, 1, bias=False)
    with model_of_at_most(9):
        layers = nn.ModuleList(nn.Identity() for _ in range(MOST_LAYERS))
        with pytest.raises(ConfigError, match=f"more than {MOST_LAYERS:,} layers"):
            layers.append(nn.Identity())


def test_a_plan_without_privacy_is_not_taken_for_the_default_one():
    table = plans.describe(offer()) | {"privacy": None, "strategy": None}
    assert accept(table, site()) == offer()
