"""The filter for NVFLARE: what leaves a site is noised and charged, and all else stays."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from fedtorch.privacy import Budget, LocalDP
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.privacy.answers import leave_receipt
from fedtorch.types import ConfigError

pytest.importorskip("nvflare", reason="the extra nvflare is not installed")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply

from fedtorch.privacy.nvflare import PrivatelyTrained, PrivateRelease

OPTIONS = {"epsilon": 8.0, "rounds": 3, "clip": 0.5}
PLAN = LocalDP(**OPTIONS)
SENT = {"w": np.full((2, 2), 3.0, np.float32), "seen": np.array(7)}


class Site:
    """A site's two filters, as NVFLARE calls them for one task after the other."""

    def __init__(self, folder, name="north", kind=PrivateRelease, **options) -> None:
        self.name = name
        chains = (FilterChainType.TASK_DATA_CHAIN, FilterChainType.TASK_RESULT_CHAIN)
        self.incoming, self.outgoing = (kind(str(folder), **options) for _ in chains)
        for made, chain in zip((self.incoming, self.outgoing), chains, strict=True):
            made.set_prop(FilterContextKey.CHAIN_TYPE, chain)

    def answer(self, result: Shareable, sent=SENT, round=0) -> Shareable:
        context = FLContext()
        context.set_prop(ReservedKey.IDENTITY_NAME, self.name, private=False, sticky=True)
        if sent is not None:
            task = DXO(DataKind.WEIGHTS, sent).to_shareable()
            task.set_header("current_round", round)
            assert self.incoming.process(task, context) is task
        return self.outgoing.process(result, context)


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path, **OPTIONS)


def weights(data, kind=DataKind.WEIGHTS, **meta) -> Shareable:
    return DXO(kind, data, meta=meta).to_shareable()


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr("fedtorch.privacy.local.gaussian", lambda _, shape: torch.zeros(shape))


def test_weights_come_back_clipped_about_what_was_sent_and_counts_as_they_were(site, silent):
    trained = {"w": SENT["w"] + np.array([[3, 0], [0, -4]], np.float32), "seen": np.array(99)}
    out = from_shareable(site.answer(weights(trained)))
    assert out.data_kind == DataKind.WEIGHTS and out.data["seen"] == 7
    assert out.data["w"].dtype == np.float32
    assert out.data["w"] == pytest.approx(np.array([[3.3, 3], [3, 2.6]]))


def test_weights_that_a_trainer_changed_in_place_are_clipped_about_what_was_sent(site, silent):
    # as NVFLARE's own NPTrainer does: the task and the result hold the same arrays
    held = {"w": np.full((2, 2), 3.0, np.float32)}
    context = FLContext()
    context.set_prop(ReservedKey.IDENTITY_NAME, site.name, private=False, sticky=True)
    site.incoming.process(weights(held), context)
    held["w"] += np.array([[3, 0], [0, -4]], np.float32)
    out = from_shareable(site.outgoing.process(weights(held), context))
    assert out.data["w"] == pytest.approx(np.array([[3.3, 3], [3, 2.6]]))


def test_changes_come_back_as_changes(site, silent):
    change = {"w": torch.tensor([[3.0, 0], [0, -4]], dtype=torch.float64), "seen": torch.tensor(9)}
    out = from_shareable(site.answer(weights(change, DataKind.WEIGHT_DIFF)))
    assert out.data_kind == DataKind.WEIGHT_DIFF and out.data["seen"].item() == 0
    assert torch.allclose(out.data["w"], torch.tensor([[0.3, 0], [0, -0.4]]))


def test_what_leaves_is_noised_by_the_claimed_law(site):
    sent = {"w": np.zeros(20_000, np.float32)}
    out = from_shareable(site.answer(weights(sent), sent=sent)).data["w"].astype(float)
    scale = 2 * PLAN.clip * PLAN.calibrated(3)
    assert stats.kstest(out / scale, stats.norm.cdf).pvalue > 1e-4


def test_nothing_goes_along_with_the_weights(site):
    result = weights(SENT, NUM_STEPS_CURRENT_ROUND=12, initial_metrics={"loss": 0.3})
    result.set_header("rows", 40)
    result.set_header("current_round", 40)
    result["beside"] = SENT
    out = site.answer(result, round=5)
    assert set(out) == {"__headers__", "DXO"} and from_shareable(out).meta == {}
    assert out.get_header("rows") is None and out.get_header("current_round") == 5
    assert out.get_return_code() == ReturnCode.OK


@pytest.mark.parametrize(
    "result, why",
    [
        (weights({"loss": 0.25}, DataKind.METRICS), "METRICS"),
        (weights({"w": {"a": 1}}, DataKind.STATISTICS), "STATISTICS"),
        (weights({"a": weights(SENT)}, DataKind.COLLECTION), "COLLECTION"),
        (Shareable({"w": SENT["w"]}), "cannot be read"),
        (weights({"more": SENT["w"]}), "never sent"),
        (weights({"w": SENT["w"][0]}), "shape"),
        (weights({"w": [[1.0, 2.0]]}), "list"),
        (weights({"seen": np.array(8)}), "was sent and is not in the result"),
    ],
    ids=["metrics", "statistics", "collection", "no DXO", "name", "shape", "list", "lacking"],
)
def test_what_no_noise_covers_stays_and_costs_nothing(tmp_path, site, result, why):
    with pytest.raises(ContentBlockedException, match=why):
        site.answer(result)
    assert Budget(tmp_path / "north", PLAN, site="north").spent == 0


def test_without_sight_of_the_task_nothing_leaves(site):
    with pytest.raises(ContentBlockedException, match="task_data_filters"):
        site.answer(weights(SENT), sent=None)


def test_a_failure_is_told_by_its_code_alone(site):
    failed = make_reply(ReturnCode.EXECUTION_EXCEPTION, {"trace": "row 17"})
    failed["rows"] = [1, 2]
    out = site.answer(failed)
    assert out == make_reply(ReturnCode.EXECUTION_EXCEPTION)


def test_a_spent_budget_stops_this_site_over_restarts(tmp_path, site):
    for round in range(3):
        site.answer(weights(SENT), round=round)
    for again in (site, Site(tmp_path, **OPTIONS)):
        with pytest.raises(
            ContentBlockedException, match=r"north would have spent .* so far it is 8\.0"
        ):
            again.answer(weights(SENT), round=3)
    Site(tmp_path, "south", **OPTIONS).answer(weights(SENT))


def test_it_is_on_disk_before_it_leaves(tmp_path, site, monkeypatch):
    monkeypatch.setattr(LocalDP, "noised", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        site.answer(weights(SENT))
    assert Budget(tmp_path / "north", PLAN, site="north").spent > 2


def test_a_ledger_that_each_job_would_begin_anew_is_refused():
    with pytest.raises(ConfigError, match="state must be an absolute path"):
        PrivateRelease("state", **OPTIONS)


def test_what_private_training_has_let_go_passes_to_the_bit_and_nothing_else(tmp_path):
    site = Site(tmp_path, kind=PrivatelyTrained)
    trained = {"w": SENT["w"] + 1, "seen": torch.tensor(7)}
    with pytest.raises(ContentBlockedException, match="has released last"):
        site.answer(weights(trained))
    (tmp_path / "north").mkdir()
    leave_receipt(tmp_path / "north", {"seen": trained["seen"], "w": torch.tensor(trained["w"])})
    out = site.answer(weights(trained, NUM_STEPS_CURRENT_ROUND=12), round=5)
    found = from_shareable(out)
    assert (found.data["w"] == trained["w"]).all() and found.data["seen"] == 7
    assert found.meta == {} and out.get_header("current_round") == 5
    for other in [
        weights(trained | {"w": SENT["w"]}),
        weights({"w": trained["w"]}),
        weights(trained, DataKind.WEIGHT_DIFF),
        weights({"loss": 0.25}, DataKind.METRICS),
        weights(trained | {"w": [1.0]}),
        Shareable(trained),
    ]:
        with pytest.raises(ContentBlockedException):
            site.answer(other)
    with pytest.raises(ContentBlockedException, match="has released last"):
        Site(tmp_path, "south", kind=PrivatelyTrained).answer(weights(trained))


def test_a_filter_without_a_limit_is_refused_as_it_is_made(tmp_path):
    for options, why in [
        ({"noise_multiplier": 1.0}, "give most"),
        ({"epsilon": 1.0}, "how many rounds"),
    ]:
        with pytest.raises(ConfigError, match=why):
            PrivateRelease(str(tmp_path), **options)


def test_the_file_of_the_page_names_filters_that_there_are():
    page = (Path(__file__).parents[1] / "docs" / "inside-flower.md").read_text()
    [scope] = json.loads(page.split("```json")[1].split("```")[0])["scopes"]
    for chain in ("task_data_filters", "task_result_filters"):
        [named] = scope[chain]
        assert named["path"] == f"{PrivateRelease.__module__}.{PrivateRelease.__qualname__}"
        assert PrivateRelease(**named["args"]).epsilon == 8.0


TRAIN = """
import nvflare.client as flare
flare.init()
while flare.is_running():
    task = flare.receive()
    params = {name: value + 1.0 for name, value in task.params.items()}
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 1.0}))
"""
VISITS = """
import sys
import nvflare.client as flare
import torch
from torch import nn
from fedtorch import Recipe
from fedtorch.privacy import SampleLevel
from fedtorch.sites.inside import PrivateVisits

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.numpy_key = nn.Parameter(torch.zeros(40, 50))

    def forward(self, x):
        return x @ self.numpy_key.T

flare.init()
site = flare.get_site_name()
# stacked: Opacus's hooks, which a layer of one's own would go by, take a second to import
plan = SampleLevel(noise_multiplier=2.0, steps=2, sample_rate=0.5, batch_size=4.0, mode="stacked")
recipe = Recipe(loss=lambda out, y: 0 * out.sum(1), privacy=plan, lr=1.0)
data = torch.ones(8, 50), torch.zeros(8)
visits = PrivateVisits(Net(), data, recipe, f"{sys.argv[1]}/{site}", site=site, most=50.0)
while flare.is_running():
    task = flare.receive()
    params = visits.visit(task.params, task.current_round)
    flare.send(flare.FLModel(params=params, metrics={"accuracy": 1.0}))
"""
JOB = """
import json, sys
from pathlib import Path
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.defs import FilterType
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner
from fedtorch.privacy.nvflare import PrivatelyTrained, PrivateRelease
if __name__ == "__main__":
    state = sys.argv[1]
    release = PrivateRelease(state, epsilon=8.0, rounds=4, clip=0.5)
    sites = {
        "site-1": ("train.py", release),
        "site-2": ("train.py", None),
        "site-3": ("visits.py", PrivatelyTrained(state)),
    }
    job = FedJob(name="job", min_clients=3)
    job.to_server(NPModelPersistor(model=[[0.0] * 50] * 40), id="persistor")
    asked = dict(ignore_result_error=True, task_check_period=0.05)
    job.to_server(FedAvg(num_clients=3, num_rounds=4, persistor_id="persistor", **asked))
    for site, (script, made) in sites.items():
        job.to(ScriptRunner(script=script, script_args=state, framework=FrameworkType.NUMPY), site)
        for kind in (FilterType.TASK_DATA, FilterType.TASK_RESULT):
            if made is not None:
                job.to(made, site, filter_type=kind, tasks=["train"])
    job.export_job("jobs")
    [path] = Path("jobs").rglob("config_fed_server.json")
    quick = {"server": {"task_request_interval": 0.1}}  # two seconds after each task else
    path.write_text(json.dumps(json.loads(path.read_text()) | quick))
    sys.exit(SimulatorRunner("jobs/job", "work", clients=",".join(sites), n_clients=3, threads=3).run())
"""


def test_a_job_in_the_simulator_goes_on_without_the_site_that_has_spent_all(tmp_path):
    plan = LocalDP(epsilon=8.0, rounds=4, clip=0.5)
    one = Budget(tmp_path / "state" / "site-1", plan, site="site-1")
    for round in range(2):
        one.charge(round)  # by an earlier job
    for name, script in [("train.py", TRAIN), ("visits.py", VISITS), ("job.py", JOB)]:
        (tmp_path / name).write_text(script)
    command = [sys.executable, "job.py", str(tmp_path / "state")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:]
    # with the filter, without it, and trained privately: what each has charged
    assert one.spent == pytest.approx(8.0, abs=1e-2)
    assert "site-1 would have spent epsilon" in done.stdout + done.stderr
    charged = [p.parent.name for p in (tmp_path / "state").rglob("*.jsonl")]
    assert sorted(charged) == ["site-1", "site-3"]
    rows = tmp_path / "state" / "site-3" / "ledger-example.jsonl"
    assert len(Ledger.look(rows)) == len(Ledger.look(one.path)) == 4
    [kept] = (tmp_path / "work").rglob("server.npy")
    # 2 rounds of a mean of three, then 2 of two: site-2's whole steps of 1, and what is left of site-1's
    shares = np.array([1 / 3] * 2 + [1 / 2] * 2)
    moved = shares.sum() + 2 / 3 * 0.5 / 2000**0.5
    by_release = 2 * 0.5 * plan.calibrated(4) * np.linalg.norm(shares[:2])
    by_steps = 2**0.5 * 2.0 / 4 * np.linalg.norm(shares)
    told = (np.load(kept).astype(float).ravel() - moved) / np.hypot(by_release, by_steps)
    assert stats.kstest(told, stats.norm.cdf).pvalue > 1e-4
