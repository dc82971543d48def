"""``fedtorch serve|site|keys``: training among organisations; see docs/sites.md."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import cast

from fedtorch import cli, folders
from fedtorch.choices import help_text
from fedtorch.commands.options import words_and_options
from fedtorch.sites import keys as certificates
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.serve import FREE_ON_RESUME, ServeConfig
from fedtorch.sites.serve import serve as run_server
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError


def serve(argv: Sequence[str]) -> int:
    """Run the server of a federation; a first word is taken as the config file."""
    if wants_help(argv, ServeConfig, "fedtorch serve"):
        return 0
    log_to_screen()
    argv = ["--config", *argv] if argv and not argv[0].startswith("--") else argv
    flags = cli.from_flags(argv, {f: t for f, t in ServeConfig.__annotations__.items()})
    if str(flags.get("resume", "false")).lower() == "true" and "run_dir" in flags:
        path = folders.config(Path(str(flags["run_dir"])).expanduser())
        config = cli.resume(ServeConfig, argv, path, FREE_ON_RESUME)
    else:
        config = cli.parse(ServeConfig, argv)
    run_server(cast(ServeConfig, config))
    return 0


def site(argv: Sequence[str]) -> int:
    """Take part in a federation with this organisation's data."""
    if wants_help(argv, SiteConfig, "fedtorch site"):
        return 0
    log_to_screen()
    with closing(Site(cli.parse(SiteConfig, argv))) as here:
        return here.run()


def keys(argv: Sequence[str]) -> int:
    """Make certificates and keys for a trial."""
    words, given = words_and_options(
        argv, "keys", {"server": True, "sites": True, "days": True, "help": False}
    )
    if "help" in given or len(words) != 1:
        print("usage: fedtorch keys FOLDER --server HOST[,HOST] --sites NAME[,NAME] [--days 365]")
        return 0 if "help" in given else 2
    days = given.get("days", "365")
    if not days.isdecimal() or not 0 < int(days) <= 3650:
        raise ConfigError(f"--days must be a whole number from 1 to 3650, got {days!r}")
    hosts, sites = (
        [v for v in given.get(name, "").split(",") if v] for name in ("server", "sites")
    )
    for folder in certificates.make(Path(words[0]), hosts, sites, int(days)):
        print(f"made {folder}")
    return 0


def wants_help(argv: Sequence[str], config: type, command: str) -> bool:
    """Print the options when asked to."""
    if "--help" in argv or "-h" in argv:
        print(help_text(config, command))
        return True
    return False


def log_to_screen() -> None:
    """Who came, who was turned away, and why: to stderr, where a supervisor keeps it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
