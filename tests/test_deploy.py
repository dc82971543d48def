"""What an operator copies: units systemd takes, configurations that parse, an image of what is here."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedtorch.privacy import SampleLevel
from fedtorch.run import cli
from fedtorch.sites.serve import ServeConfig, make_plan
from fedtorch.sites.site import SiteConfig

DEPLOY = Path(__file__).parents[1] / "deploy"


def test_the_configurations_parse_and_fit_together():
    serve = cli.parse(ServeConfig, ["--config", str(DEPLOY / "serve.toml")])
    site = cli.parse(SiteConfig, ["--config", str(DEPLOY / "site.toml")])
    plan = make_plan(serve, "run")
    assert site.name in serve.sites and serve.model in site.models
    assert isinstance(plan.privacy, SampleLevel) and plan.privacy.rounds == serve.rounds + 2
    assert plan.privacy.epsilon <= site.max_epsilon and site.dataset.kind == serve.kind


def test_the_page_shows_the_configurations_as_they_are():
    page = (DEPLOY.parent / "docs/sites.md").read_text()
    for name in ("serve.toml", "site.toml"):
        text = (DEPLOY / name).read_text()
        assert "".join(f"    {line}\n" if line else "\n" for line in text.splitlines()) in page, (
            name
        )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
@pytest.mark.parametrize("name", ["fedtorch-site.service", "fedtorch-server.service"])
def test_systemd_takes_the_units(name, tmp_path):
    text = (DEPLOY / name).read_text()
    assert text.count("/opt/fedtorch/bin/fedtorch") in (1, 2)
    unit = tmp_path / name
    # the program must be there to be verified
    unit.write_text(text.replace("/opt/fedtorch/bin/fedtorch", sys.executable))

    def verify():
        words = ["systemd-analyze", "verify", "--man=no", str(unit)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    code, said = verify()
    assert code == 0 and name not in said, said
    unit.write_text(unit.read_text().replace("ProtectSystem", "ProtectSystems"))
    assert "ProtectSystems" in verify()[1]  # it does look


def test_the_image_is_made_of_what_is_here():
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Containerfile").read_text(), flags=re.MULTILINE)
    steps = [line.split() for line in text.replace("\\\n", " ").splitlines() if line]
    known = {"FROM", "WORKDIR", "COPY", "ARG", "RUN", "USER", "VOLUME", "ENTRYPOINT", "CMD"}
    assert {s[0] for s in steps} <= known and steps[0][0] == "FROM"
    copied = [source for s in steps if s[0] == "COPY" for source in s[1:-1]]
    assert copied and all((DEPLOY.parent / source).exists() for source in copied)
    assert {"pyproject.toml", "constraints.txt", "fedtorch", "models", "train.py"} <= {*copied}
    order = [s[0] for s in steps]
    assert order.index("USER") > max(k for k, word in enumerate(order) if word == "RUN")
