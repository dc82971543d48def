"""The notebooks run from the first cell to the last, and are kept with what they showed."""

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra test: nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(900)  # half a minute on a machine that has nothing else to do
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client's own event loop
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_notebook_runs_and_was_kept_with_its_outputs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        nbformat.read(path, as_version=4), timeout=600, kernel_name="python3", resources=place
    ).execute()
    code = [c for c in kept.cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    drawn = [o for c in code for o in c.outputs if "image/png" in o.get("data", {})]
    assert drawn and all(len(o["data"]["image/png"]) < 80_000 for o in drawn)
    said = "".join(str(o) for c in code for o in c.outputs)
    assert not re.search(r"/(home|work|tmp|root)/", said) and "Traceback" not in said
