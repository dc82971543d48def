"""The record of a run read back: what TensorBoard, JSON lines and adapters were given."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.plugins.hparams import metadata

from fedtorch import disk
from fedtorch.commands.train import train_module
from fedtorch.data import Digits
from fedtorch.rounds.history import read
from fedtorch.run import checkpoint
from fedtorch.tracking import Record, TensorBoard, drawings, maps
from fedtorch.tracking.record import Lines
from fedtorch.tracking.tags import FAMILIES, SMOOTHED, TAGS, custom_scalars, overview, purpose
from fedtorch.tracking.tensorboard import protos
from fedtorch.tracking.tensorboard.events import trim
from fedtorch.tracking.tensorboard.protos import EventFile, events
from fedtorch.training import losses
from fedtorch.training.evaluate import evaluate
from fedtorch.types import ConfigError

ROOT = Path(__file__).parent.parent
SMALL = ["--privacy", "none", "--model", "logistic", "--epochs", "1", "--clients", "5"]
NO_PICTURES = ["--tracking.pictures", "false"]
PACED = {"simulated_seconds", "staleness_mean", "staleness_max"}
PACED |= {"visits_min", "visits_median", "visits_max"}
"""Of a buffered pace alone."""
MASKED = {"clamped", "secure_client_seconds", "secure_server_seconds"}
"""Of the aggregator secure alone."""
NO_PRIVACY = {n for n in TAGS if not n.startswith(("privacy_", "noised_"))} - PACED - MASKED


def run(folder: Path, *more: str) -> int:
    return train_module().main([*SMALL, "--run-dir", str(folder), *more])


def accumulate(folder: Path) -> EventAccumulator:
    sizes = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    return EventAccumulator(str(folder), size_guidance=sizes).Reload()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    more = ("--rounds", "4", "--validation", "0.2", "--tracking.every", "2")
    more += ("--engine.chunk", "1")  # keeps clients apart, for the projector
    assert run(folder, *more, "--tracking.client-runs", "2") == 0
    return folder


def test_every_documented_tag_is_written_and_every_written_one_documented(finished):
    found = accumulate(finished).Tags()["scalars"]
    families = [t for t in found if t.partition("/")[0] in FAMILIES]
    assert sorted({TAGS[n].tag for n in NO_PRIVACY} | set(families)) == sorted(found)
    assert {"test/loss", "test/accuracy", "validation/accuracy_min"} <= set(families)


def test_the_documentation_is_the_table_of_tags():
    text = (ROOT / "docs/tensorboard.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_/0-9]+)` \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    table = [r for r in rows if r[0] in {t.tag for t in TAGS.values()}]
    assert table == [tuple(t) for t in TAGS.values()]


BEFORE = {"test/loss", "test/accuracy", "time/elapsed", "time/log"}
BEFORE |= {f"_overview/{name}" for name in ("test_loss", "test_accuracy", "seconds")}
"""Tags that round 0 has: the score before any training."""


def test_the_score_before_training_is_that_of_the_initial_model(finished):
    before, *after = read(finished / "metrics.jsonl")
    assert before.keys() == {
        "round",
        "test_loss",
        "test_accuracy",
        "seconds_log",
        "seconds_elapsed",
    }
    config, data = train_module().Config(model="logistic"), Digits().load(0)
    model = train_module().make_model(config, data)
    assert (
        evaluate(model, data.test, {"loss": losses.LOSSES["cross_entropy"]})["loss"]
        == before["test_loss"]
    )
    assert before["test_accuracy"] < after[-1]["test_accuracy"]


def test_steps_are_the_rounds_one_by_one(finished):
    record = accumulate(finished)
    for tag in record.Tags()["scalars"]:
        first = 0 if tag in BEFORE else 1
        assert [s.step for s in record.Scalars(tag)] == [*range(first, 5)], tag
    assert [m["round"] for m in read(finished / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    elapsed = [s.value for s in record.Scalars("time/elapsed")]
    assert elapsed == sorted(elapsed) and elapsed[0] > 0


def test_what_json_lines_hold_is_what_tensorboard_shows(finished):
    record, lines = accumulate(finished), read(finished / "metrics.jsonl")
    for name in NO_PRIVACY:
        shown = [s.value for s in record.Scalars(TAGS[name].tag)]
        assert shown == pytest.approx([m[name] for m in lines if name in m], rel=1e-6), name


def test_pictures_histograms_graph_and_text(finished):
    record = accumulate(finished)
    tags = record.Tags()
    assert set(tags["images"]) == {
        "data/partition", "data/participation", "test/confusion", "test/mistakes",
        "data/validation_accuracy_by_client", "data/validation_loss_by_client",
    }  # fmt: skip
    assert [i.step for i in record.Images("test/confusion")] == [2, 4]
    assert {"weights/1.weight", "updates/1.bias", "validation/accuracy_by_client"} <= set(
        tags["histograms"]
    )
    assert record.Histograms("weights/1.weight")[0].histogram_value.num == 640
    assert tags["graph"]
    text = record.Tensors("config")[0].tensor_proto.string_val[0].decode()
    assert "lr = 0.1" in text


def test_projector_has_a_row_for_each_update(finished):
    points = (finished / "projector/client_updates.tsv").read_text().splitlines()
    rows = (finished / "projector/client_updates-labels.tsv").read_text().splitlines()
    assert len(points) == 10 and len(points[0].split("\t")) == 32
    assert rows[0] == "client\tround" and len(rows) == 11
    assert {r.split("\t")[1] for r in rows[1:]} == {"2", "4"}
    assert (
        'tensor_path: "projector/client_updates.tsv"'
        in (finished / "projector_config.pbtxt").read_text()
    )


def test_two_clients_have_runs_of_their_own(finished):
    folders = list((finished / "clients").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("client-") for f in folders)
    record = accumulate(folders[0])
    scores = [f"validation_{name}" for name in ("accuracy", "loss")]
    assert sorted(record.Tags()["scalars"]) == ["loss", "update_norm", *scores]
    assert [s.step for s in record.Scalars("loss")] == [1, 2, 3, 4]


def plugin_content(folder: Path, plugin: str) -> dict[str, bytes]:
    return dict(accumulate(folder).PluginTagToContent(plugin))


def test_hparams_hold_the_config_and_name_the_metrics(finished):
    content = plugin_content(finished, "hparams")
    start = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["strategy"].string_value == "fedavg"
    assert start.hparams["model"].string_value == "logistic"
    assert "run_dir" not in start.hparams and metadata.EXPERIMENT_TAG not in content
    assert metadata.SESSION_END_INFO_TAG in content


def test_hparams_ticks_what_differs_and_the_overview(tmp_path):
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    for name, words in (("a", ()), ("b", ("--lr", "0.3"))):
        more = ("--rounds", "1", "--validation", "0.2", *NO_PICTURES, *words)
        assert run(tmp_path / name, *more) == 0
    runs = plugin_event_multiplexer.EventMultiplexer()
    runs.AddRunsFromDirectory(str(tmp_path))
    board = Context(
        TBContext(data_provider=data_provider.MultiplexerDataProvider(runs.Reload(), str(tmp_path)))
    )
    here = RequestContext()
    found = board.hparams_metadata(here, "")
    experiment = board.experiment_from_metadata(here, "", True, found, [])
    assert [h.name for h in experiment.hparam_infos if h.differs] == ["lr"]
    assert experiment.hparam_infos[0].name == "lr"  # TensorBoard ticks the first five of each
    first = [m.name.tag.removeprefix("_overview/") for m in experiment.metric_infos][:4]
    assert first == ["seconds", "test_accuracy", "test_loss", "worst_client_accuracy"]


def test_curves_say_what_they_are_for(finished):
    about = accumulate(finished).SummaryMetadata
    assert about("train/loss").summary_description.startswith("loss: training loss over the visit")
    assert purpose("_overview/epsilon").endswith(SMOOTHED)
    assert purpose("nonprivate/client_loss_q1").startswith("not private. loss: first quartile")
    assert purpose("test/f1") == ""


def test_the_overview_shows_the_worst_end_where_it_is_known():
    values = {"test/mae": 1.0, "validation/mae_min": 0.5, "validation/mae_max": 2.0}
    values |= {"nonprivate/validation_mae_max": 3.0}
    found = overview(values, ("mae", "high"))
    own = {"worst_client_mae": 2.0, "worst_client_mae_not_private": 3.0}
    assert found == {f"_overview/{k}": v for k, v in ({"test_mae": 1.0} | own).items()}
    assert overview(values, ("mae", None)) == {"_overview/test_mae": 1.0}


def test_a_map_of_clients_and_rounds_has_whole_names_and_grey_where_nothing_is():
    long = "University Hospital of the North, ward for children"
    rounds = {1: {long: 0.5, "west": 0.7}, 2: {long: 0.6, "west": None}}
    parts = torch.arange(4).split(2)

    def three(ids):
        drawn = (
            drawings.client_map([*ids, "west"], rounds, "accuracy"),
            drawings.participation_map([*ids, "west"], {1: {ids[0]: 1}, 2: {"west": 2}}),
            drawings.partition_map([*ids, "west"], parts, torch.tensor([0, 1, 0, 1])),
            drawings.partition_map([*ids, "west"], parts, None),
        )
        return [np.array(Image.open(io.BytesIO(png)).convert("RGB")).astype(int) for png in drawn]

    length = maps._length(long) - maps._length("north")
    for k, (whole, short) in enumerate(zip(three([long]), three(["north"]), strict=True)):
        edges = whole[0], whole[-1], whole[:, 0], whole[:, -1]
        assert all((edge == 255).all() for edge in edges)  # nothing is cut off
        assert whole.shape[int(k < 2)] >= short.shape[int(k < 2)] + length * (k > 1)
        assert whole.shape[int(k < 2)] > maps._length(long) + 200
    assert {(0xDD,) * 3, (0x44, 1, 0x54), (0xFD, 0xE7, 0x25)} <= {
        tuple(p) for p in three([long])[0].reshape(-1, 3)[::7].tolist()
    }


def test_the_numbers_at_a_scale_are_round_and_inside():
    assert maps.marks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert maps.marks(3.7, 1100) == [200 * k for k in range(1, 6)]
    assert maps.marks(0.5, 0.5) == [0.5] and maps.marks(float("nan"), 1) == []
    assert maps.some(["a", "b", "c"], 2) == {0.0: "a", 2.0: "c"}


def test_a_run_with_pictures_reads_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert drawings.partition_map(["a"], [torch.arange(2)], torch.tensor([0, 1]))
    assert drawings.client_map(["a"], {1: {"a": 0.5}}, "accuracy")
    assert drawings.confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 0]), 2)
    assert drawings.image_grid(torch.rand(2, 3, 4, 4), ["a", "b"], "two")


@pytest.mark.parametrize("private", [False, True])
def test_pages_of_curves_name_real_tags(private):
    known = [t.tag for t in TAGS.values()] + ["test/loss", "test/accuracy"]
    known += [f"nonprivate/{n}" for n in TAGS] if private else []
    for page, charts in custom_scalars(private).items():
        for title, (kind, tags) in charts.items():
            for tag in tags:
                assert any(re.fullmatch(f"{tag}.*", k) for k in known), (page, title, tag)
                assert kind == "Multiline" or tag in known
    assert ("Privacy" in custom_scalars(private)) == private


def test_kill_and_resume_leave_no_gap_and_no_doubled_step(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *SMALL, "--rounds", "400", "--checkpoint-every", "3"]
    command += ["--tracking.every", "5", "--tracking.client-runs", "1", "--run-dir", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.time() + 120
    while len(read(folder / "metrics.jsonl")) < 7 and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = len(read(folder / "metrics.jsonl"))
    assert before >= 7
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 9')  # what a kill in the middle of a line leaves
    rounds = before + 4
    assert run(folder, "--rounds", str(rounds), "--resume") == 0
    for where in (folder, next((folder / "clients").iterdir())):
        record = accumulate(where)
        for tag in record.Tags()["scalars"]:
            first = 0 if tag in BEFORE else 1
            assert [s.step for s in record.Scalars(tag)] == list(range(first, rounds + 1)), tag
    lines = read(folder / "metrics.jsonl")
    assert [m["round"] for m in lines] == list(range(rounds + 1))
    elapsed = [m["seconds_elapsed"] for m in lines]
    assert elapsed == sorted(elapsed)
    written = [
        v.tag for p in folder.glob(f"*{disk.EVENTS}") for _, e in events(p) for v in e.summary.value
    ]
    assert written.count("_hparams_/session_start_info") == 1
    assert written.count("_hparams_/session_end_info") == 1
    assert written.count("config") == 1


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    full = OSError(28, "No space left on device")
    write = EventFile.write

    def fail_later(self, proto, step):
        if step >= 2:
            raise full
        write(self, proto, step)

    monkeypatch.setattr(EventFile, "write", fail_later)
    assert run(tmp_path / "run", "--rounds", "4", "--tracking.every", "2") == 0
    out = capsys.readouterr().out
    assert out.count("warning: EventTracker failed (No space left on device)") == 1
    assert [m["round"] for m in read(tmp_path / "run/metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_full_disk_costs_neither_lines_nor_checkpoints_the_run(tmp_path, monkeypatch, capsys):
    save = checkpoint.save

    def full(folder, state, keep=2):
        if state["round"] == 2:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos")
        return save(folder, state, keep)

    monkeypatch.setattr(checkpoint, "save", full)
    monkeypatch.setattr(Lines, "write", lambda self, m: (_ for _ in ()).throw(OSError(28, "full")))
    assert run(tmp_path / "run", "--rounds", "3") == 0
    out = capsys.readouterr().out
    assert out.count("metrics.jsonl failed") == 1
    assert out.count("warning: checkpoint not written") == 1
    assert (tmp_path / "run/checkpoints/round-000003.pt").is_file()


def test_a_real_full_device_is_warned_of_once_for_each_file(tmp_path):
    said = []
    with Record(TensorBoard(), tmp_path, 0, said.append) as record:
        record.tracker.files[""].close()
        record.tracker.files[""].file = open("/dev/full", "wb")  # noqa: SIM115
        record.lines.close()
        record.lines.file = open("/dev/full", "w")  # noqa: SIM115
        for k in (1, 2, 3):
            record.round({"round": k, "lr": 0.1})
    assert said == [
        f"warning: {who} failed (No space left on device); the run goes on without it"
        for who in ("metrics.jsonl", "EventTracker")
    ]


def test_a_folder_with_foreign_event_files_is_refused_and_left_alone(tmp_path, capsys):
    foreign = tmp_path / "events.out.tfevents.1.host"
    foreign.write_bytes(b"theirs")
    assert run(tmp_path, "--rounds", "1") == 2
    assert "not of a run" in capsys.readouterr().err
    assert foreign.read_bytes() == b"theirs"


def test_foreign_event_files_that_come_later_survive_a_resume(tmp_path):
    assert run(tmp_path / "run", "--rounds", "1", *NO_PICTURES) == 0
    foreign = tmp_path / "run/events.out.tfevents.1.host"
    foreign.write_bytes(b"theirs")
    assert run(tmp_path / "run", "--rounds", "2", "--resume") == 0
    assert foreign.read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["with space", "ünïcødé-✓", "a/b/c", "semi;colon&'quote'"])
def test_odd_run_names_work(name, tmp_path):
    assert run(tmp_path / name, "--rounds", "1", *NO_PICTURES) == 0
    assert accumulate(tmp_path / name).Tags()["scalars"]


def test_groups_can_be_turned_off(tmp_path):
    off = [f"--tracking.{g}" for g in ("pictures", "histograms", "graph", "projector")]
    words = [w for g in off for w in (g, "false")]
    assert run(tmp_path / "run", "--rounds", "1", *words) == 0
    tags = accumulate(tmp_path / "run").Tags()
    assert tags["images"] == [] == tags["histograms"] and not tags["graph"]
    assert not (tmp_path / "run/projector").exists()


def test_no_tracking_leaves_the_lines_alone(tmp_path):
    assert run(tmp_path / "run", "--rounds", "2", "--tracking", "none") == 0
    assert not list((tmp_path / "run").glob("*tfevents*"))
    assert len(read(tmp_path / "run/metrics.jsonl")) == 3


def test_client_data_goes_under_nonprivate_in_a_private_run(tmp_path):
    said = []
    with Record(TensorBoard(), tmp_path, 0, said.append, private=True) as record:
        record.config({"lr": 0.1}, ["test/loss"])
        record.round({"round": 1, "nonprivate_train_loss": 2.0, "privacy_epsilon": 0.5})
        record.text("privacy", "**epsilon** 0.5")
    found = accumulate(tmp_path)
    assert sorted(found.Tags()["scalars"]) == [
        "_overview/epsilon", "_overview/seconds",
        "nonprivate/train_loss", "privacy/epsilon", "time/elapsed", "time/log",
    ]  # fmt: skip
    assert "privacy" in found.Tags()["tensors"]
    assert not said


@pytest.mark.parametrize(
    "option, message",
    [("every=0", "tracking.every must be at least 1"), ("client-runs=-1", "must be a number >= 0")],
)
def test_options_that_cannot_be_meant(option, message, tmp_path, capsys):
    assert run(tmp_path / "run", f"--tracking.{option}") == 2
    assert message in capsys.readouterr().err


def test_tensorflow_is_never_imported_even_where_it_is_installed(tmp_path):
    fake = tmp_path / "tensorflow"
    fake.mkdir()
    (fake / "__init__.py").write_text("import pathlib; pathlib.Path(__file__ + '.ran').touch()")
    code = (
        "from fedtorch.tracking import Record, TensorBoard; from pathlib import Path\n"
        f"with Record(TensorBoard(), Path({str(tmp_path / 'run')!r}), 0, print) as record:\n"
        "    record.config({'lr': 0.1}, ['test/loss'])\n"
        "    record.round({'round': 1, 'lr': 0.1})\n"
    )
    (tmp_path / "run").mkdir()
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert list((tmp_path / "run").glob(f"*{disk.EVENTS}"))
    assert not list(fake.glob("*.ran"))


def test_lines_read_back(tmp_path):
    lines = Lines(tmp_path)
    lines.write({"round": 1, "loss": 0.5})
    lines.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"round": 1, "loss": 0.5}
    again = Lines(tmp_path, start=1)
    assert again.before == [{"round": 1, "loss": 0.5}]
    again.close()


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(range(256)) * 5])
def test_checksums_and_names_are_tensorboards(data):
    assert protos.masked_crc32c(data) == pywrap_tensorflow.masked_crc32c(data)
    made = protos.experiment({}, []), protos.session({}), protos.session_end(0.0)
    tags = metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG
    for one, tag in zip(made, tags, strict=True):
        (value,) = one.value
        assert (value.tag, value.metadata.plugin_data.plugin_name) == (tag, metadata.PLUGIN_NAME)
        content = value.metadata.plugin_data.content
        found = protos.plugin_data_pb2.HParamsPluginData.FromString(content)
        assert found.version == metadata.PLUGIN_DATA_VERSION


def test_event_file_is_cut_after_a_half_record(tmp_path):
    with Record(TensorBoard(), tmp_path, 0, print) as record:
        record.round({"round": 1, "lr": 0.1})
    (path,) = tmp_path.glob(f"*{disk.EVENTS}")
    path.write_bytes(path.read_bytes() + b"\x20\0\0\0\0")
    with Record(TensorBoard(), tmp_path, 1, print) as record:
        record.round({"round": 2, "lr": 0.1})
    assert [s.step for s in accumulate(tmp_path).Scalars("train/lr")] == [1, 2]


def test_missing_adapters_say_how_to_get_them(tmp_path, monkeypatch):
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, f"{name}.tracking", None)
    from fedtorch.tracking import MLflow, WandB

    for tracking, name in ((MLflow(), "mlflow"), (WandB(), "wandb")):
        with pytest.raises(ConfigError, match=rf"pip install 'fedtorch\[{name}\]'"):
            tracking.open(tmp_path, 0)


class FakeMlflow:
    """The part of an MLflow store that the adapter uses; kept over two starts of a run."""

    def __init__(self):
        self.params, self.metrics, self.files, self.ended = {}, [], [], 0

    def __call__(self, uri):
        return self

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return "1"

    def create_run(self, experiment, run_name):
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def get_run(self, run):
        latest = {name: value for name, value, _ in self.metrics}
        return SimpleNamespace(data=SimpleNamespace(metrics=latest))

    def log_param(self, run, name, value):
        assert name not in self.params  # a real store refuses to change one
        self.params[name] = value

    def log_metric(self, run, name, value, step):
        self.metrics.append((name, value, step))

    def log_text(self, run, text, name):
        self.files.append(name)

    def log_artifact(self, run, path, folder):
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        self.files.append(f"{folder}/{Path(path).name}")

    def set_terminated(self, run):
        self.ended += 1


def test_mlflow_gets_each_step_once_over_a_resume(tmp_path, monkeypatch):
    # a stand-in for the package, which is too large to install for one test
    store = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mlflow.tracking", SimpleNamespace(MlflowClient=store))
    folder = tmp_path / "run"
    assert run(folder, "--rounds", "3", "--checkpoint-every", "2", "--tracking", "mlflow") == 0
    for path in (folder / "checkpoints").glob("round-000003.pt"):
        path.unlink()  # as if killed after the third round was logged, before it was saved
    assert run(folder, "--rounds", "4", "--resume") == 0
    assert [step for name, _, step in store.metrics if name == "train/loss"] == [1, 2, 3, 4]
    assert store.params["strategy"] == "fedavg" and store.ended == 2
    assert "config.md" in store.files and "test/confusion-000004.png" in store.files
    assert len(read(folder / "metrics.jsonl")) == 5


def test_wandb_goes_on_in_the_run_it_began(tmp_path, monkeypatch):
    began, logged = [], []
    finished = []

    def init(**options):
        began.append(options)
        return SimpleNamespace(
            id="w1",
            config=SimpleNamespace(update=lambda table, allow_val_change: None),
            log=lambda values, step: logged.append((step, set(values))),
            finish=lambda: finished.append(True),
        )

    fake = SimpleNamespace(init=init, Image=lambda image: image.size)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "run"
    offline = ("--tracking", "wandb", "--tracking.mode", "offline")
    assert run(folder, "--rounds", "1", *offline) == 0
    assert run(folder, "--rounds", "2", "--resume") == 0
    assert [b["id"] for b in began] == [None, "w1"]
    assert [b["mode"] for b in began] == ["offline", "offline"]
    assert [s for s, names in logged if "train/loss" in names] == [1, 2]
    assert any("test/confusion" in names for _, names in logged)
    assert len(finished) == 2


def test_a_model_that_cannot_be_written_is_said_and_the_checkpoint_is_kept(
    tmp_path, monkeypatch, capsys
):
    whole = disk.whole

    def full(path, **more):
        if path.name == "model.safetensors":
            raise OSError(28, "No space left on device")
        return whole(path, **more)

    monkeypatch.setattr(disk, "whole", full)
    assert run(tmp_path / "run", "--rounds", "1") == 2
    assert "the trained model cannot be written" in capsys.readouterr().err
    assert (tmp_path / "run/checkpoints/round-000001.pt").is_file()


def test_a_strict_private_run_records_nothing_of_the_clients(tmp_path):
    folder = tmp_path / "run"
    words = ["--model", "logistic", "--clients", "5", "--rounds", "2", "--validation", "0.2"]
    words += ["--privacy", "sample", "--privacy.strict", "true", "--tracking.client-runs", "2"]
    words += ["--tracking.projector", "true", "--run-dir", str(folder)]
    assert train_module().main(words) == 0
    tags = accumulate(folder).Tags()
    assert {"privacy/epsilon", "test/accuracy", "train/step_norm"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"test/confusion"}, "no test example is shown"
    assert "privacy" in tags["tensors"]
    assert not [t for t in tags["scalars"] if t.startswith("time/")]
    assert len({e.wall_time for e in accumulate(folder).Scalars("train/step_norm")}) == 1
    for tag in (*tags["scalars"], *tags["histograms"]):
        assert not tag.startswith("nonprivate/") and "by_client" not in tag
    assert not (folder / "clients").exists() and not (folder / "projector").exists()


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_strict_run_refuses_trackers_that_send_times_of_their_own(name, tmp_path, capsys):
    words = ["--privacy.strict", "true", "--tracking", name, "--run-dir", str(tmp_path / "run")]
    assert train_module().main(words) == 2
    assert "privacy.strict keeps back: use tensorboard or none" in capsys.readouterr().err


def test_a_private_run_marks_what_is_not_covered(tmp_path):
    folder = tmp_path / "run"
    words = ["--model", "logistic", "--clients", "5", "--rounds", "2", "--privacy", "sample"]
    assert (
        train_module().main(
            [*words, "--audit", "--privacy.insecure-seed", "1", "--run-dir", str(folder)]
        )
        == 0
    )
    found = accumulate(folder).Tags()
    scalars = set(found["scalars"])
    written = {t.tag for n, t in TAGS.items() if n.startswith("privacy_")}
    assert written <= scalars
    assert {"nonprivate/train_loss", "nonprivate/client_loss_q1"} <= scalars
    assert {"train/loss", "clients/loss_q1"}.isdisjoint(scalars)
    assert "_overview/epsilon" in scalars
    assert {"nonprivate/partition", "nonprivate/participation"} <= set(found["images"])


def test_pictures_of_a_model_that_branches():
    from fedtorch.tracking.tensorboard.graph import modules

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x)) + self.a(x)

    nodes = {name: inputs for name, _, inputs, _ in modules(Two(), torch.zeros(2, 3))}
    assert nodes == {
        "input": [],
        "a_Linear": ["input"],
        "b_Linear": ["a_Linear"],
        "a_Linear_2": ["input"],
        "output": ["a_Linear_2"],
    }


def test_curves_of_personal_models_are_those_of_their_clients(tmp_path):
    words = "--strategy ditto --evaluate personal --finetune-steps 3 --partition shards --rounds 2"
    assert run(tmp_path / "run", *words.split(), *NO_PICTURES) == 0
    shown, lines = accumulate(tmp_path / "run"), read(tmp_path / "run/metrics.jsonl")

    def curve(tag: str) -> list[tuple[int, float]]:
        return [(s.step, s.value) for s in shown.Scalars(tag)]

    ends = {"": lambda v: sum(v) / len(v), "_min": min, "_max": max}
    means = []
    for kind, rounds in (("validation", (1, 2)), ("shared", (2,)), ("finetuned", (2,))):
        own = [[s["accuracy"] for s in lines[r][f"{kind}_by_client"].values()] for r in rounds]
        for end, of in ends.items():
            wanted = [(r, pytest.approx(of(v), rel=1e-6)) for r, v in zip(rounds, own, strict=True)]
            assert curve(f"{kind}/accuracy{end}") == wanted
        means.append(curve(f"{kind}/accuracy")[-1][1])
        if kind == "validation":
            (spread,) = (
                h for h in shown.Histograms("validation/accuracy_by_client") if h.step == 2
            )
            ends_of = (spread.histogram_value.min, spread.histogram_value.max)
            assert ends_of == pytest.approx((min(own[-1]), max(own[-1])))
    assert len(set(means)) == 3, "no model is taken for another"
    assert curve("_overview/worst_client_accuracy") == curve("validation/accuracy_min")
    (panel,) = shown.Tensors("validation/by_client")
    told = panel.tensor_proto.string_val[0].decode()
    assert panel.step == 2 and "shared accuracy" in told and "finetuned accuracy" in told


def test_curves_of_clusters_are_the_shares_of_their_clients(tmp_path):
    more = ("--rounds", "2", "--strategy", "ifca", *NO_PICTURES)
    assert run(tmp_path / "run", *more) == 0
    shown = accumulate(tmp_path / "run")
    shares = [[s.value for s in shown.Scalars(f"strategy/m{j}")] for j in range(2)]
    assert torch.tensor(shares).sum(0).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("how", ["empty", "flipped", "half"])
def test_a_damaged_event_file_is_said_on_resume(how, tmp_path, capsys):
    file = EventFile(tmp_path, disk.EVENTS)
    for step in range(1, 4):
        file.write(protos.scalars({"a": 1.0}, {}), step)
    file.close()
    (path,) = tmp_path.iterdir()
    trim(path, 3)
    assert capsys.readouterr().out == ""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes({"empty": b"", "flipped": raw, "half": raw[: len(raw) // 2]}[how])
    trim(path, 3)
    assert "is cut short or damaged at byte" in capsys.readouterr().out


def test_whom_a_robust_rule_left_out_is_seen_in_the_picture(tmp_path, monkeypatch):
    seen = {}

    def drawn(ids, rounds):
        seen.update(rounds)
        return original(ids, rounds)

    original = drawings.participation_map
    monkeypatch.setattr(drawings, "participation_map", drawn)
    run(tmp_path / "one", "--rounds", "1", "--aggregator", "krum")
    assert sorted(seen[1].values()) == [1, 3, 3, 3, 3]

    def orange(states):
        picture = original(["a", "b"], {1: states})
        pixels = np.array(Image.open(io.BytesIO(picture)).convert("RGB"))
        return bool((pixels == [0xED, 0xAE, 0x49]).all(-1).any())

    assert orange({"a": 1, "b": 3})
    assert not orange({"a": 1, "b": 2})
