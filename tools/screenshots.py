"""TensorBoard on real runs, photographed page by page in headless Chromium.

    make screenshots        # needs chromium, and for pages of the site make docs before

Trains the runs that are not there yet (a plain run, a private run, a sweep), starts TensorBoard on each and
drives the browser; PNG files go to ``build/screenshots``. Words behind the script take some jobs alone.
"""

import contextlib
import fcntl
import io
import itertools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

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
SITE = ("index", "first-run", "own-data", "tensorboard", "notebook-hospitals")
PAGES = {
    "scalars": ("scalars&_smoothingWeight=0", "expand"),  # smoothing bends epsilon
    "custom": ("custom_scalars&_smoothingWeight=0", "expand"),
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
    """Chromium without a window, told what to do through two pipes (the DevTools protocol)."""

    def __init__(self, profile: str) -> None:
        """Starts it, with one empty page."""
        ask, self.asking = (fcntl.fcntl(f, fcntl.F_DUPFD_CLOEXEC, 10) for f in os.pipe())
        self.answers, answer = (fcntl.fcntl(f, fcntl.F_DUPFD_CLOEXEC, 10) for f in os.pipe())
        self.process = subprocess.Popen(
            ["chromium", "--remote-debugging-pipe", *FLAGS, f"--user-data-dir={profile}"],
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: [os.dup2(ask, 3), os.dup2(answer, 4)],
            pass_fds=(3, 4),
        )
        self.number, self.read, self.page = 0, b"", {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.page = {"sessionId": found["sessionId"]}

    def call(self, method: str, **options: Any) -> Any:
        """One request; its result."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": options} | self.page
        os.write(self.asking, json.dumps(asked).encode() + b"\0")
        while True:
            while b"\0" not in self.read:
                if not select.select([self.answers], [], [], 120)[0]:
                    raise SystemExit(f"chromium does not answer {method}")
                self.read += os.read(self.answers, 1 << 20)
            told, _, self.read = self.read.partition(b"\0")
            answer = json.loads(told)
            if answer.get("id") == self.number:
                if "result" not in answer:
                    raise SystemExit(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def script(self, code: str, *args: Any) -> None:
        """Run JavaScript in the page."""
        given = ", ".join(json.dumps(a) for a in args)
        self.call("Runtime.evaluate", expression=f"(function() {{ {code} }})({given})")

    def photograph(
        self, url: str, act: str, path: Path, size: tuple[int, int], wait: float
    ) -> None:
        """Open, wait until the page has drawn itself, act, save in few colours."""
        given = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Page.bringToFront")
        self.call("Emulation.setDeviceMetricsOverride", **given)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        time.sleep(wait)
        if act == "expand":
            self.script(EXPAND)
            time.sleep(6)
        elif act == "color":
            self.script(COLOR)
            time.sleep(4)
        elif act:
            self.script(CLICK, act)
            time.sleep(4)
        shot = b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(96, dither=Image.Dither.NONE)
        picture.save(path, optimize=True)
        print(path, f"{path.stat().st_size // 1000} kB", flush=True)

    def close(self) -> None:
        """End it."""
        self.call("Browser.close")
        self.process.wait(30)


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


def boards(browser: Browser, job: str) -> None:
    """Pages of TensorBoard on the runs of a job, trained first where they are not there yet."""
    folder = RUNS / job if "--sweep" in JOBS[job] else RUNS / job / job
    if not folder.exists():
        command = [sys.executable, "train.py", *JOBS[job], "--run-dir", str(folder)]
        subprocess.run(command, check=True)
    port = free_port()
    where = ["--logdir", str(RUNS / job), "--port", str(port), "--load_fast=false"]
    board = str(Path(sys.executable).parent / "tensorboard")
    with started(board, *where, "--reload_interval", "0"):
        wait_for(port)
        time.sleep(4)
        for page, (plugin, act) in PAGES.items():
            if job == "sweep" and page not in ("scalars", "hparams", "parallel"):
                continue
            if job == "private" and page == "projector":
                continue  # off in a private run
            url = f"http://localhost:{port}/?darkMode=false#{plugin}"
            size = (1500, 1900 if page == "custom" else 1000)
            browser.photograph(url, act, OUT / f"{job}-{page}.png", size, 14)


def site(browser: Browser) -> None:
    """Pages of the site that ``make docs`` has built, on a screen and on a telephone."""
    for page, width in itertools.product(SITE, (1400, 400)):
        url = Path(f"build/docs/{page}.html").resolve().as_uri()
        browser.photograph(url, "", OUT / f"site-{page}-{width}.png", (width, 1000), 3)


def main() -> None:
    """Photograph what is asked for, or everything."""
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile, contextlib.closing(Browser(profile)) as browser:
        for job in sys.argv[1:] or [*JOBS, "site"]:
            site(browser) if job == "site" else boards(browser, job)


if __name__ == "__main__":
    main()
