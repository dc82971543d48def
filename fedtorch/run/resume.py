"""Going on from a folder of ``Checkpoint`` or ``Record``."""

import hashlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedtorch.options import fit
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.run import checkpoint, files
from fedtorch.run.folder import MADE_BY, of_command
from fedtorch.server import Server
from fedtorch.types import ConfigError


def resume(server: Server, folder: str | Path) -> bool:
    """Bring ``server`` to the newest checkpoint of a folder; False: there is none yet, and nothing is done.

    The server must be made as that of the run was. What callbacks remember goes to those of the next
    ``fit``: n rounds, a break and m more end as n + m. Raises ConfigError where the folder's run is
    another's or went by another recipe or plan, or a privacy ledger is missing.
    """
    fit("server", server, Server)
    path = Path(fit("folder", folder, str | Path)).expanduser()
    if not checkpoint.everything(path / "checkpoints"):
        return False
    saved, damaged = checkpoint.newest(path / "checkpoints")
    for _, why in damaged:
        print(f"warning: {why}; going on from the one before, round {saved['round']}")
    by_command(saved, path)
    if saved["seed"] != server.seed:
        raise ConfigError(
            f"the run in {path} has seed {saved['seed']}, not {server.seed}: make the Server as it was"
        )
    same_clients(server, saved, path)
    same_recipe(server, saved, path)
    go_on(server, saved, path)
    return True


def go_on(server: Server, saved: dict[str, Any], folder: Path) -> None:
    """Bring ``server`` to a checkpoint; raises ConfigError where the folder has no whole ledger of it."""
    private = saved.get("privacy")
    ledger = Ledger.resume(folder / files.LEDGER, private["ledger"]) if private else None
    server.load_state_dict(saved, ledger)


def state(server: Server) -> dict[str, Any]:
    """What a checkpoint holds: the server's state, whose work it is, and by what recipe."""
    return {**server.state_dict(), **of_clients(server), "recipe": of_recipe(server)}


def of_clients(server: Server) -> dict[str, Any]:
    """How many clients a run has, and a digest of their names, which do not change."""
    # a name may have a line's end in it, and bytes that are no text
    lines = (str(i).replace("\\", r"\\").replace("\n", r"\n") for i in server.ids)
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogatepass")).hexdigest()
    return {"clients": {"count": len(server.ids), "sha256": digest}}


def of_recipe(server: Server) -> dict[str, Any]:
    """What decides a run beside its data, by name, in plain values."""
    from fedtorch.run.described import described  # the reader of options comes with it

    return described(server, 0)


def by_command(saved: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where the run is one of the command, which has its model, data and recipe."""
    config = tomllib.loads(str(saved.get("config", "")))
    if config and MADE_BY not in config:
        raise of_command(path, config)


def same_recipe(server: Server, saved: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where the run went by another recipe or plan; says it where that is not known."""
    from fedtorch.run.described import same_run

    known = saved.get("recipe") or tomllib.loads(str(saved.get("config", "")))
    if known:
        same_run(known, of_recipe(server), path, ("dataset",))
    else:
        print(
            f"note: the run in {path} does not say by what recipe it was made: that must be as it was"
        )


def same_clients(server: Server, saved: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError where the run is of other clients: what they remember and spent goes by names."""
    known, now = saved.get("clients"), of_clients(server)["clients"]
    if known is not None and known != now:
        count = f"{known['count']:,}" if known["count"] != now["count"] else "others"
        raise ConfigError(
            f"the run in {path} is of other clients than these {now['count']:,} ({count}): go on with the "
            "same, by the same names and in the same order"
        )


def goes_on(server: Server, path: Path) -> None:
    """Raises ConfigError where the folder holds another run than the server's, and no new one can begin.

    Under a privacy plan the ledger is kept there from now on.
    """
    keep_ledger(server, path)
    if not checkpoint.everything(path / "checkpoints"):
        return
    saved, now = checkpoint.load(path / "checkpoints"), server.state_dict()
    by_command(saved, path)
    same = saved["round"] == now["round"] and saved["model"].keys() == now["model"].keys()
    if not (same and all(torch.equal(v, now["model"][k]) for k, v in saved["model"].items())):
        raise ConfigError(
            f"{path} already holds a run, which has come to round {saved['round']}: go on with it by "
            f"fedtorch.resume(server, {str(path)!r}) before fit, or choose another folder"
        )
    if "recipe" in saved:
        same_recipe(server, saved, path)


def alone(server: Server, keeper: Any, path: Path) -> None:
    """Raises ConfigError where another callback of the same fit keeps its own in this folder."""
    own = type(keeper).__name__
    for other in server.observers:
        kept = getattr(other, "path", None)
        if other is not keeper and isinstance(kept, Path) and kept.resolve() == path.resolve():
            saves = " (Record saves checkpoints too)" if type(other).__name__ != own else ""
            raise ConfigError(
                f"{path} is the folder of {type(other).__name__} and of {own}: leave one out{saves}, or "
                "give each a folder"
            )


def keep_ledger(server: Server, path: Path) -> None:
    """Charge to a journal in the folder, which gets what is charged already."""
    if server.private is None:
        return
    before = server.private.ledger
    if before.journal is not None:
        if before.journal.path.resolve() != (path / files.LEDGER).resolve():
            raise ConfigError(
                f"the privacy ledger of this run is {before.journal.path}, and it has one alone: keep "
                f"checkpoints and record in {before.journal.path.parent}"
            )
        return
    kept = Ledger(path / files.LEDGER, server.private.plan.unit)
    for entry in before.entries:
        kept.charge(entry.round, entry.event, entry.clients)
    server.private.ledger = kept
