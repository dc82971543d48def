"""Two hospitals and a server on this machine: ``make demo-sites``. Under a minute.

Four things happen that also happen between real organisations: keys are made, each site gets a folder with
its own rows and nobody else's, a server without any data starts, and each site joins it over TLS.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

SITES = ["north", "south"]
ADDRESS = "127.0.0.1:18443"


def write_rows(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """One hospital's table, scaled by its own figures."""
    x = (x - x.mean(0)) / x.std(0)
    names = ",".join([f"f{k}" for k in range(x.shape[1])] + ["malignant"])
    np.savetxt(
        path, np.column_stack([x, 1 - y]), delimiter=",", header=names, comments="", fmt="%g"
    )


def main() -> int:
    """Set up, start three processes, wait for the run to end."""
    folder = Path(tempfile.mkdtemp(prefix="fedtorch-sites-"))
    print(f"everything is in {folder}")
    x, y = load_breast_cancer(return_X_y=True)
    for k, name in enumerate(SITES):
        (folder / name).mkdir()
        write_rows(folder / name / "rows.csv", x[k::2], y[k::2])

    fedtorch = [sys.executable, "-m", "fedtorch"]
    make_keys = [*fedtorch, "keys", str(folder / "keys"), "--server", "127.0.0.1", "--sites"]
    subprocess.run([*make_keys, ",".join(SITES)], check=True)
    (folder / "serve.toml").write_text(
        f'sites = {SITES}\naddress = "{ADDRESS}"\ncredentials = "{folder}/keys/server"\n'
        f'run_dir = "{folder}/run"\ninput_shape = [30]\nkind = "binary"\noutputs = 1\n'
        'model = "logistic"\nrounds = 10\nminimum = 2\n'
    )
    started = [subprocess.Popen([*fedtorch, "serve", str(folder / "serve.toml")])]
    for name in SITES:
        options = {
            "server": ADDRESS,
            "name": name,
            "credentials": str(folder / "keys" / name),
            "state": str(folder / name / "state"),
            "dataset": "csv",
            "dataset.path": str(folder / name / "rows.csv"),
            "dataset.kind": "binary",
            "max-epsilon": "8",
        }
        flags = [word for k, v in options.items() for word in (f"--{k}", v)]
        started.append(subprocess.Popen([*fedtorch, "site", *flags]))
    try:
        return max(p.wait() for p in started)
    finally:
        for p in started:
            p.kill()


if __name__ == "__main__":
    sys.exit(main())
