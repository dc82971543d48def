"""``fedtorch serve|site|keys``: training among organisations; see docs/sites.md."""

import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import cast

from fedtorch.commands.options import words_and_options
from fedtorch.data.tokens import PREFIX
from fedtorch.engines.local import usable
from fedtorch.options import near
from fedtorch.run import cli, help, zoo
from fedtorch.run import folder as folders
from fedtorch.run.console import page
from fedtorch.sites import keys as certificates
from fedtorch.sites import sealed
from fedtorch.sites.ends import EndedEarly
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.sites.serve import FREE_ON_RESUME
from fedtorch.sites.serve import serve as run_server
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError


def serve(argv: Sequence[str]) -> int:
    """Run the server of a federation; a first word is taken as the config file.

    0: all rounds are trained. 1: sites stayed away, or no report was ever used. 3: the privacy budget is
    spent. 128 + signal: stopped.
    """
    if wants_help(argv, ServeConfig, "fedtorch serve", help.RUN_TOPICS):
        return 0
    log_to_screen()
    argv = cli.renamed(argv, ServeConfig)
    argv = ["--config", *argv] if argv and not argv[0].startswith("--") else argv
    flags = cli.from_flags(argv, {f.name: f.type for f in fields(ServeConfig)})
    if str(flags.get("resume", "false")).lower() == "true" and "run_dir" in flags:
        path = folders.config(Path(str(flags["run_dir"])).expanduser())
        folders.began_by("serve", path)
        config = cli.resumed_config(ServeConfig, argv, path, FREE_ON_RESUME)
    else:
        config = cli.parse(ServeConfig, argv)
    try:
        run_server(cast(ServeConfig, config))
    except EndedEarly as e:
        print(f"fedtorch: {e}", file=sys.stderr)
        return e.code
    return 0


def site(argv: Sequence[str]) -> int:
    """Take part in a federation with this organisation's data."""
    if wants_help(argv, SiteConfig, "fedtorch site", help.SITE):
        return 0
    log_to_screen()
    try:
        with stoppable(), closing(Site(site_config(argv))) as here:
            return here.run()
    except Stopped as e:
        print(
            f"fedtorch: stopped by {signal.Signals(e.number).name}; a visit that was not reported is given "
            "again, and charged again, when this site is back",
            file=sys.stderr,
        )
        return 128 + e.number


def site_config(argv: Sequence[str]) -> SiteConfig:
    """The site's options."""
    config = cast(SiteConfig, cli.parse(SiteConfig, cli.renamed(argv, SiteConfig)))
    usable(config.device, "device")
    known = zoo.names()
    for name in config.models:
        if not name.startswith(PREFIX) and name not in known:
            raise ConfigError(
                f"--models {name}: this site has no such model{near(name, known)}; it has "
                f"{', '.join(known)}"
            )
    return config


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, wherever this site was; no file is left half written by it."""

    def __init__(self, number: int) -> None:
        """The signal."""
        super().__init__(number)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """In here both signals raise Stopped; the first of them: to close what is open takes a moment."""

    def stop(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def keys(argv: Sequence[str]) -> int:
    """Make certificates and keys for a trial."""
    words, given = words_and_options(
        argv, "keys", {"server": True, "sites": True, "days": True, "he": False}
    )
    if len(words) != 1:
        raise ConfigError(
            f"fedtorch keys takes one folder, but got {len(words)}: fedtorch keys FOLDER --server HOST "
            "--sites NAME,NAME"
        )
    days = given.get("days", "365")
    if not days.isdecimal() or not 0 < int(days) <= 3650:
        raise ConfigError(f"--days must be a whole number from 1 to 3650, got {days!r}")
    hosts, sites = (
        [v for v in given.get(name, "").split(",") if v] for name in ("server", "sites")
    )
    for folder in certificates.make(Path(words[0]), hosts, sites, int(days)):
        print(f"made {folder}")
    if "he" in given:
        for path in sealed.make(Path(words[0]), [*certificates.fingerprints(Path(words[0]))]):
            print(f"made {path}")
    print(
        "\n# who takes part, by certificate: for site.toml of a site that pins its peers\n[peers]"
    )
    for name, print_of in certificates.fingerprints(Path(words[0])).items():
        print(f'{name if "." not in name else repr(name)} = "{print_of}"')
    return 0


def wants_help(argv: Sequence[str], config: type, command: str, topics: help.Topics) -> bool:
    """Print the options when asked to."""
    asked = cli.help_asked(argv)
    if asked is not None:
        page(help.help_text(config, command, topics, asked))
    return asked is not None


def log_to_screen() -> None:
    """Who came, who was turned away, and why: to stderr, where a supervisor keeps it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Flower's calls, several a second
