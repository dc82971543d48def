"""UCI Heart Disease from the files as they are downloaded: private scaling beside public bounds.

    python -m benchmarks.heart_tables ../shared/data/heart-disease

Every line is ``fedtorch train`` with the README's command over the four hospitals' files, and what the
line names in place of its scaling. Accuracy on the held-out third, over seeds 0 to 4: each has a split,
initial weights and noise of its own, the same split in every line.
"""

import contextlib
import io
import json
import statistics
import sys
import tempfile
from pathlib import Path

from fedtorch.__main__ import main as fedtorch

COLUMNS = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,num"
TABLE = [
    *("--dataset", "csv", "--dataset.columns", COLUMNS, "--dataset.drop", "slope,ca,thal"),
    *(
        "--dataset.positive",
        "1,2,3,4",
        "--dataset.missing",
        "drop",
        "--dataset.test-fraction",
        "0.34",
    ),
    *("--dataset.categories", "cp=1|2|3|4,restecg=0|1|2", "--model", "logistic", "--rounds", "10"),
]
CLOSE = "age=20:90,trestbps=80:200,chol=100:500,thalach=60:210,oldpeak=-3:7"
ROUGH = "age=0:120,trestbps=0:250,chol=0:600,thalach=0:250,oldpeak=-5:10"
PRIVATE = ["--dataset.standardize", "private", "--dataset.bounds", ROUGH]
RUNS = {
    "public bounds, close": ["--dataset.bounds", CLOSE],
    "public bounds, rough": ["--dataset.bounds", ROUGH],
    "private, noise 10": PRIVATE,
    "private, noise 5": [*PRIVATE, "--privacy.statistics-noise", "5"],
    "private sums, noise 5": [
        *(*PRIVATE, "--privacy.statistics-noise", "5"),
        *("--dataset.statistics", "sums"),
    ],
    "no scaling": [],
    "no privacy, standardize": ["--privacy", "none", "--dataset.standardize", "true"],
}


def run(data: Path, more: list[str], seed: int) -> tuple[float, float]:
    """Accuracy and epsilon of one run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        where = ["--dataset.path", str(data / "processed.*.data"), "--run-dir", f"{folder}/run"]
        argv = ["train", *where, *TABLE, *more, "--seed", str(seed), "--tracking", "none"]
        if fedtorch(argv):
            raise SystemExit("a run failed")
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    return summary["test_accuracy"], summary["epsilon"] or 0.0


def main(data: Path, seeds: int = 5) -> None:
    """Print a line for each kind of scaling."""
    for name, more in RUNS.items():
        found = [run(data, more, seed) for seed in range(seeds)]
        scores = [a for a, _ in found]
        print(
            f"{name:<26} {statistics.mean(scores):.3f} +- {statistics.stdev(scores):.3f}"
            f"   epsilon {max(e for _, e in found):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
