"""Two hospitals and a server on this machine: ``make demo-sites``. Under a minute.

Four things happen that also happen between real organisations: keys are made, each site gets a folder with
its own rows and nobody else's, a server without any data starts, and each site joins it over TLS.

``python examples/two_sites.py --keep FOLDER`` keeps all of it to look at; else nothing is left.
"""

import argparse
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer

SITES = ["north", "south"]
PROGRAM = [sys.executable, "-m", "fedtorch"]


def write_rows(path: Path, x: np.ndarray, y: np.ndarray) -> None:
    """One hospital's table, scaled by its own figures."""
    x = (x - x.mean(0)) / x.std(0)
    names = ",".join([f"f{k}" for k in range(x.shape[1])] + ["malignant"])
    np.savetxt(
        path, np.column_stack([x, 1 - y]), delimiter=",", header=names, comments="", fmt="%g"
    )


def free_port() -> int:
    """One that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def set_up(folder: Path, address: str) -> list[list[str]]:
    """Make rows, keys and the server's configuration; the commands to start, the server's first."""
    x, y = load_breast_cancer(return_X_y=True)
    for k, name in enumerate(SITES):
        (folder / name).mkdir(parents=True)
        write_rows(folder / name / "rows.csv", x[k::2], y[k::2])
    make_keys = [*PROGRAM, "keys", str(folder / "keys"), "--server", "127.0.0.1", "--sites"]
    subprocess.run([*make_keys, ",".join(SITES)], check=True)
    (folder / "serve.toml").write_text(
        f'sites = {SITES}\naddress = "{address}"\ncredentials = "{folder}/keys/server"\n'
        f'run_dir = "{folder}/run"\ninput_shape = [30]\nkind = "binary"\noutputs = 1\n'
        'model = "logistic"\nrounds = 10\nminimum = 2\n'
    )
    commands = [[*PROGRAM, "serve", str(folder / "serve.toml")]]
    for name in SITES:
        options = {
            "server": address,
            "name": name,
            "credentials": str(folder / "keys" / name),
            "state": str(folder / name / "state"),
            "dataset": "csv",
            "dataset.path": str(folder / name / "rows.csv"),
            "dataset.kind": "binary",
            "max-epsilon": "8",
        }
        commands.append([*PROGRAM, "site", *[w for k, v in options.items() for w in (f"--{k}", v)]])
    return commands


def run(commands: list[list[str]]) -> int:
    """Start all, and wait for all to end, or for one to fail: the others would wait for it for an hour."""
    started = []
    # where a supervisor ends this, what was started here ends with it
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for command in commands:
            started.append(subprocess.Popen(command))
        while None in (codes := [p.poll() for p in started]) and not any(codes):
            time.sleep(0.1)
        return max(abs(code or 0) for code in codes)
    finally:
        for process in started:
            process.kill()
            process.wait()  # they write in the folder as long as they are there
        signal.signal(signal.SIGTERM, before)


def main() -> int:
    """Set up in a folder of one's own or a passing one, and run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, metavar="FOLDER")
    keep = parser.parse_known_args()[0].keep
    address = f"127.0.0.1:{free_port()}"
    if keep is not None:
        folder = keep.resolve()
        print(f"everything is in {folder}")
        return run(set_up(folder, address))
    with tempfile.TemporaryDirectory(prefix="fedtorch-sites-") as name:
        print(f"everything is in {name} until the end; --keep FOLDER keeps it")
        return run(set_up(Path(name), address))


if __name__ == "__main__":
    sys.exit(main())
