"""TensorBoard on real runs, photographed page by page in headless Chromium.

    make screenshots        # needs Debian's packages chromium and chromium-driver

Trains the runs that are not there yet (a plain run, a private run, a sweep), starts TensorBoard on each and
drives the browser over the WebDriver protocol; PNG files go to ``build/screenshots``.
"""

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path("build/screenshots")
RUNS = OUT / "runs"
COMMON = ["--rounds", "30", "--validation", "0.2", "--participation", "uniform", "--lr", "0.1"]
COMMON += ["--participation.cohort_size", "14", "--participation.dropout", "0.1", "--clients", "20"]
SWEEP = ["lr=0.02,0.05,0.1,0.2", "strategy=fedavg,fedprox", "epochs=1,2"]
JOBS = {
    "plain": [
        *COMMON,
        "--privacy",
        "none",
        "--tracking.client-runs",
        "3",
        "--model",
        "mlp",
        "--engine.solver",
        "stacked",
    ],  # keeps clients apart: points for the projector
    "private": ["--rounds", "30", "--validation", "0.2", "--model", "mlp"],
    "sweep": ["--privacy", "none", "--rounds", "8", "--model", "mlp", "--sweep", *SWEEP],
}
PAGES = {
    "scalars": ("scalars", "expand"),
    "custom": ("custom_scalars", "expand"),
    "images": ("images", "expand"),
    "histograms": ("histograms", "expand"),
    "graph": ("graphs", ""),
    "text": ("text", ""),
    "hparams": ("hparams", ""),
    "parallel": ("hparams", "Parallel Coordinates View"),
    "projector": ("projector", "color"),
}
FLAGS = ["--headless=new", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]
FLAGS += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--window-size=1500,1000"]

DEEP = """
const all = (root, found = []) => {
  for (const e of root.querySelectorAll('*')) {
    found.push(e);
    if (e.shadowRoot) all(e.shadowRoot, found);
    if (e.contentDocument) all(e.contentDocument, found);
  }
  return found;
};
"""
EXPAND = (
    DEEP
    + """
for (const e of all(document)) {
  if (e.matches('tf-category-paginated-view, tf-category-pane') && e.opened === false) e.opened = true;
}
"""
)
COLOR = (
    DEEP
    + """
for (const e of all(document)) {
  if (e.matches('vz-projector-data-panel')) e.selectedColorOptionName = 'client';
}
"""
)
CLICK = (
    DEEP
    + """
const wanted = all(document).filter(e => e.textContent.trim().toLowerCase() === arguments[0].toLowerCase());
if (wanted.length) wanted[wanted.length - 1].click();
"""
)


class Browser:
    """A WebDriver session."""

    def __init__(self, port: int, profile: str) -> None:
        """Starts Chromium."""
        self.root = f"http://localhost:{port}"
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        found = self.call("POST", "/session", {"capabilities": wanted})
        self.root += f"/session/{found['sessionId']}"

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request; the answer's value."""
        data = None if body is None else json.dumps(body).encode()
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, data, head, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def script(self, code: str, *args: Any) -> Any:
        """Run JavaScript in the page."""
        return self.call("POST", "/execute/sync", {"script": code, "args": list(args)})

    def photograph(self, url: str, act: str, path: Path) -> None:
        """Open, wait until the page has drawn itself, act, save."""
        height = 1900 if "custom" in url else 1000
        self.call("POST", "/window/rect", {"width": 1500, "height": height})
        self.call("POST", "/url", {"url": "about:blank"})
        self.call("POST", "/url", {"url": url})
        time.sleep(8)
        if act == "expand":
            self.script(EXPAND)
            time.sleep(6)
        elif act == "color":
            self.script(COLOR)
            time.sleep(4)
        elif act:
            self.script(CLICK, act)
            time.sleep(4)
        path.write_bytes(b64decode(self.call("GET", "/screenshot")))


@contextlib.contextmanager
def started(*words: str) -> Iterator[None]:
    """A server that runs while the block does."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return int(s.getsockname()[1])


def wait_for(port: int) -> None:
    """Until something answers."""
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), 1):
            return
        time.sleep(0.2)
    raise SystemExit(f"nothing answers on port {port}")


def main() -> None:
    """Train, start, photograph."""
    jobs = sys.argv[1:] or list(JOBS)
    for name in jobs:
        folder = RUNS / name if "--sweep" in JOBS[name] else RUNS / name / name
        if not folder.exists():
            command = [sys.executable, "train.py", *JOBS[name], "--run-dir", str(folder)]
            subprocess.run(command, check=True)
    board = str(Path(sys.executable).parent / "tensorboard")
    driver = free_port()
    with started("chromedriver", f"--port={driver}"), tempfile.TemporaryDirectory() as profile:
        wait_for(driver)
        browser = Browser(driver, profile)
        for name in jobs:
            port = free_port()
            where = ["--logdir", str(RUNS / name), "--port", str(port), "--load_fast=false"]
            with started(board, *where, "--reload_interval", "0"):
                wait_for(port)
                time.sleep(4)
                for page, (plugin, act) in PAGES.items():
                    if name == "sweep" and page not in ("scalars", "hparams", "parallel"):
                        continue
                    if name == "private" and page == "projector":
                        continue  # off in a private run
                    url = f"http://localhost:{port}/?darkMode=false#{plugin}"
                    browser.photograph(url, act, OUT / f"{name}-{page}.png")
                    print(OUT / f"{name}-{page}.png", flush=True)
        with contextlib.suppress(OSError):
            browser.call("DELETE", "")


if __name__ == "__main__":
    main()
