"""``fedtorch attack`` on run folders: what it finds, what it leaves there, and what it marks."""

import json
import stat
from pathlib import Path

import pytest
import torch
from PIL import Image

from fedtorch.__main__ import main
from fedtorch.privacy import SampleLevel
from fedtorch.run import attacked
from fedtorch.tracking import TensorBoard, drawings
from fedtorch.tracking.tensorboard import protos

QUICK = ["--model", "logistic", "--clients", "3", "--rounds", "1", "--tracking.pictures", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}
    for name, options in {
        "plain": ["--privacy", "none", "--epochs", "1"],
        "strict": ["--privacy.strict", "true", "--privacy.noise-multiplier", "2"],
    }.items():
        made[name] = str(tmp_path_factory.mktemp("runs") / name)
        assert main(["train", *QUICK, *options, "--run-dir", made[name]]) == 0
    return made


def tags(folder: Path) -> set[str]:
    files = folder.rglob("*tfevents*")
    return {v.tag for f in files for _, e in protos.events(f) for v in e.summary.value}


def test_gradients_give_away_what_clients_hold(trained, capsys):
    run = Path(trained["plain"])
    for _ in range(2):  # a second one takes the place of the first
        assert main(["attack", "gradient", str(run)]) == 0
    out, err = capsys.readouterr()
    assert "reads the raw examples" in err and "plain (this run)" in out and "120.0" in out
    kept = run / "attacks"
    table = json.loads((kept / "gradient.json").read_text())
    assert "owner" in table["for_its_owner"] and table["way"] == "divide"
    assert (
        table["views"]["plain"]["psnr_median"] > 40 > 12 > table["views"]["private"]["psnr_median"]
    )
    assert table["views"]["plain"]["this_run"] and not table["views"]["mean"]["this_run"]
    for name in ("gradient.json", "gradient.png"):
        assert stat.S_IMODE((kept / name).stat().st_mode) == 0o600
    with Image.open(kept / "gradient.png") as picture:
        assert picture.size[0] > 300
    assert {"attack/psnr_plain", "attack/psnr_private", "attack/gradient"} <= tags(kept)
    assert len([*kept.rglob("*tfevents*")]) == 1
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "Gradient inversion" in page and "120.0" in page and "<img" not in page


def test_membership_is_asked_of_the_run_and_of_shadows(trained, capsys):
    run = trained["plain"]
    assert main(["attack", "membership", run, "--shadows", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    table = json.loads(out)
    assert "5 models are trained" in err and table["shadows"] == 4 and table["examples"] > 1000
    assert {*table["attacks"]} == {"LiRA", "RMIA", "loss"} and {*table["own_model"]} == {
        "LiRA",
        "loss",
    }
    # a linear model after one pass knows nothing by heart
    assert all(0.45 < v["auc"] < 0.6 for v in table["attacks"].values())
    kept = Path(run) / "attacks"
    assert "attack/lira_tpr_at_1_percent_fpr" in tags(kept)
    with Image.open(kept / "membership.png") as picture:
        assert picture.size[0] > 300


def test_of_a_strict_run_nothing_goes_further_than_its_owner(trained, capsys):
    run = Path(trained["strict"])
    assert main(["attack", "gradient", str(run), "--clients", "3"]) == 0
    assert "private (this run)" in capsys.readouterr().out
    kept = run / "attacks"
    assert {p.name for p in kept.iterdir()} == {"gradient.json", "gradient.png"}
    assert main(["report", str(run)]) == 0
    assert "Gradient inversion" not in (run / "report.html").read_text()


def test_of_a_private_run_figures_are_marked(tmp_path):
    plan, figures = SampleLevel(), {"psnr_plain": 50.0, "psnr_none": float("nan")}
    png = drawings.image_rows([("a", torch.rand(1, 1, 2, 2), [""])], "one")
    attacked.write(tmp_path, "gradient", {}, png, figures, plan, TensorBoard())
    found = tags(tmp_path)
    assert {"nonprivate/attack_psnr_plain", "nonprivate/gradient"} <= found
    assert not any(t.startswith("attack") or "none" in t for t in found)


def test_a_federation_has_no_data_here(tmp_path, capsys):
    (tmp_path / "config.toml").write_text('sites = ["a", "b", "c"]\n')
    assert main(["attack", "gradient", str(tmp_path)]) == 2
    assert "a site attacks a simulation of its own data" in capsys.readouterr().err


def test_rows_of_tables_are_cells_of_a_picture():
    cells = attacked._cells(torch.arange(14.0).view(2, 7))
    assert cells.shape == (2, 1, 3, 3)
    assert cells[1, 0].flatten().tolist() == [7, 8, 9, 10, 11, 12, 13, 0, 0]


def test_a_damaged_file_is_no_section(tmp_path):
    (tmp_path / "attacks").mkdir()
    for text in ("{", "[]", '{"attack": "gradient", "views": 3}'):
        (tmp_path / "attacks" / "gradient.json").write_text(text)

        class Run:
            folder, private = tmp_path, False

        assert attacked.section(Run()) == ""


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "takes gradient or membership, and a run folder"),
        (["gradients", "RUN"], "did you mean gradient?"),
        (
            ["gradient", "RUN", "--shadows", "3"],
            "fedtorch attack gradient has no option --shadows",
        ),
        (["gradient", "RUN", "--examples", "0"], "attack.examples"),
        (["gradient", "RUN", "--way", "guess"], "attack.way"),
        (["membership", "RUN", "--shadows", "many"], "attack.shadows"),
        (["membership", "nowhere"], "holds no run"),
    ],
    ids=["nothing", "misspelt", "of the other", "none", "no way", "no number", "no run"],
)
def test_bad_input_is_one_sentence(words, said, trained, capsys):
    words = [trained["plain"] if w == "RUN" else w for w in words]
    capsys.readouterr()
    assert main(["attack", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
