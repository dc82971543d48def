"""A wheel built from here does the same job from another folder; `make wheel-check` installs it too."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="part of the extra dev since the wheel is tested")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", BUILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


def test_the_wheel_holds_the_package_the_loop_and_the_zoo_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {n for n in names if ".dist-info/" not in n}
    here = {
        *(str(p.relative_to(ROOT)) for p in (ROOT / "fedtorch").rglob("*.py")),
        *(f"fedtorch/models/{p.name}" for p in (ROOT / "models").glob("*.py")),
        *(str(p.relative_to(ROOT)) for p in (ROOT / "fedtorch").rglob("*.tmpl")),
        "fedtorch/train.py",
        "fedtorch/py.typed",
    }
    assert packed == here
    assert any(n.endswith("licenses/LICENSE") for n in names)
    metadata = (
        zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    )
    assert "License-Expression: Apache-2.0" in metadata


def test_the_wheel_trains_and_finds_its_models_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    zipfile.ZipFile(wheel).extractall(site)
    elsewhere.mkdir()
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}

    def run(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, *argv], cwd=elsewhere, env=env, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    listed = "import fedtorch, fedtorch.__main__ as m; print(fedtorch.__file__); m.main(['models'])"
    place, *models = run("-c", listed).splitlines()
    assert str(site) in place
    assert {"cnn", "mlp", "transformer"} <= {s.split()[0] for s in models}
    # the general solver: loops would be compiled anew for this place
    train = ["train", "--privacy", "none", "--model", "mlp", "--engine.solver", "general"]
    assert "done: 1 round " in run("-m", "fedtorch", *train, "--rounds", "1", "--run-dir", "run")
    assert (elsewhere / "run" / "model.safetensors").is_file()
