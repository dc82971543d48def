"""The fast path on an accelerator, as far as a machine without one can tell."""

import subprocess
import sys
from pathlib import Path


def test_training_on_another_device_is_training_here():
    # autograd counts devices once, when it first runs: the pretended one needs a process of its own
    cases = Path(__file__).with_name("device_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout and "100%" in done.stdout
