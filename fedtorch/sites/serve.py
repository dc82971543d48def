"""The server among the sites: the rounds of ``train.py``, without any data."""

import json
import secrets
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from fedtorch import disk, seeds
from fedtorch.data import Data, prepared, tokens
from fedtorch.data.base import facts_of
from fedtorch.data.tokens import PREFIX
from fedtorch.rounds.figures import Metrics
from fedtorch.rounds.observers import Observer
from fedtorch.rounds.progress import amount
from fedtorch.run import checkpoint, files, huggingface, loop
from fedtorch.run.messages import conclude, introduce, starting_score, write_results
from fedtorch.run.shown import Shown
from fedtorch.server import Server
from fedtorch.sites import statistics
from fedtorch.sites.ends import EndedEarly, early, enough
from fedtorch.sites.engine import Sites, SitesSession, remotes
from fedtorch.sites.offer import Plan
from fedtorch.sites.options import ServeConfig
from fedtorch.tracking import TensorBoard
from fedtorch.training.losses import DEFAULTS
from fedtorch.types import ConfigError

FREE_ON_RESUME = {
    "rounds",
    "resume",
    "run_dir",
    "deadline",
    "minimum",
    "enough",
    "most_examples",
    "patience",
    "address",
    "engine",
    "he_public",
}
"""Options a resumed run may change."""


def serve(config: ServeConfig) -> dict[str, Any]:
    """One run; returns the summary. Raises EndedEarly where not all rounds were trained."""
    with ExitStack() as held:  # the lock on the run folder, to the end
        return run(config, held)


def run(config: ServeConfig, held: ExitStack) -> dict[str, Any]:
    """The run; ``held`` keeps the lock on its folder."""
    began = time.perf_counter()
    if not config.run_dir:
        raise ConfigError("--run-dir: in which folder shall the run be kept?")
    folder = Path(config.run_dir)
    plan = replace(make_plan(config, ""), **known(folder, config.resume))
    if config.resume:
        plan = calibrated(plan, folder)
    with seeds.seeded(seeds.derive(config.seed, "model")):
        model, recipe = plan.build()
    plan = replace(plan, weights=getattr(model, "digest", ""))
    files.savable(model)
    own = own_data(config, plan)
    callbacks = config.callbacks()
    keys = Path(config.credentials) if config.credentials else None
    engine = Sites(
        plan=plan,
        address=config.address,
        keys=keys,
        flower=config.engine,
        public=public_key(config),
        deadline=config.deadline,
        minimum=config.minimum,
        enough=config.enough,
        most_examples=config.most_examples,
    )
    clients = remotes(config.sites)
    server = Server(
        model,
        clients,
        recipe,
        participation=config.participation,
        schedule=config.schedule,
        engine=engine,
        seed=config.seed,
    )
    with closing(server):
        names = plan.judging(recipe, model, own.test)[0] or ("loss",) if own is not None else ()
        notes = loop.begin(callbacks, server, config.rounds, [f"test_{name}" for name in names])
        session = server.session
        assert isinstance(session, SitesSession)
        session.ended, session.began = "error", False  # unless it turns out otherwise
        check_cohort(config, session)
        kept = loop.open_folder(
            config,
            folder,
            server,
            held,
            keep=lambda path: keep(path, plan),
        )
        session.began = True
        with loop.around(config, server, kept, TensorBoard(), began) as here:
            # before the first round: what is promised, and how good the model is untrained
            at = (
                f"at the SuperLink {config.engine.address}"
                if config.engine
                else f"listening at {config.address}"
            )
            here.report.say(f"{at}, waiting for {', '.join(config.sites)}")
            opening = f"{amount(len(config.sites), 'site')}, {config.model}, "
            opening += amount(config.rounds, "round")
            for note in notes:
                here.report.say(f"note: {note}")
            introduce(here.report, opening, server)
            ready = statistics_came(session, config, here)
            test = own_test(own, session.options.plan) if ready else None
            judged = plan.judging(server.recipe, model, test) if test is not None else ({}, None)
            scores = loop.ScoreKeeper(here, test, judged[0], step=judged[1])
            starting_score(here.record, here.report, scores.last, server)
            shown = Shown.of(server, kept.path, config.rounds, own)
            here.report.attempt("report.json", shown.write)

            # who looks at each round, in this order: the end is seen first, and saving comes last
            traffic, saving = Traffic(server, session), Checkpoints(here)
            here.attend([traffic, scores], callbacks, [here.record, here.report, saving])

            # the rounds
            while ready and not here.last and enough(session, config, here.stop):
                server.round()
            why = early(server, session, config, here.stop.asked)
            here.end(scores, "serve")
            pairs = "" if config.step else config.kind
            here.report.attempt("report.json", shown.write, model, test, pairs)
            session.ended = why.reason if why else ""
    summary = here.summary(scores.last, str(why or ""))
    write_results(here.report, folder, summary, server)
    if why is not None:
        number, rounds = server.round_number, config.rounds
        saved = here.chosen() or "; the model so far is saved"
        text = f"ended after {number} of {rounds} rounds: {why}{saved}"
        spent = why.reason == "budget" and config.plan.target is not None
        if number < rounds and not spent:  # else a run that goes on ends at once
            text += f" (go on: fedtorch serve --run-dir {folder} --resume)"
        raise EndedEarly(why.code, text, why.reason)
    here.report.attempt("the report", conclude, here.report, folder, summary, server, here.why())
    return summary


@dataclass(eq=False)
class Checkpoints(loop.Checkpoints):
    """Sites keep what they remember of the visits in the last one, until there is another."""

    def save(self) -> None:
        """A checkpoint that could not be written is none."""
        super().save()
        session = self.loop.server.session
        assert isinstance(session, SitesSession)
        session.saved = {**session.counted}


@dataclass(eq=False)
class Traffic(Observer):
    """Bytes and seconds of each site, as far as they may be told."""

    server: Server
    session: SitesSession

    def round(self, figures: Metrics) -> Metrics:
        """Those of the round that is over."""
        return self.server.mark(self.session.figures())


def check_cohort(config: ServeConfig, session: SitesSession) -> None:
    """Raises ConfigError where no round could ever count: it would cost budgets, and move nothing."""
    most = config.participation.most(len(config.sites))
    if (least := session.least_of(most)) > most:
        raise ConfigError(
            f"no round would count: participation asks {most} of the {len(config.sites)} sites at most, "
            f"and {least} must report (--minimum, and three or the threshold in a secure sum): ask more, "
            "or lower it"
        )


def public_key(config: ServeConfig) -> Path | None:
    """Where the public key of encrypted sums lies, if there is one."""
    if config.he_public:
        return Path(config.he_public)
    own = Path(config.credentials, "he.public")
    return own if config.credentials and own.exists() else None


def statistics_came(session: SitesSession, config: ServeConfig, here: loop.Loop) -> bool:
    """Whether training may begin: statistics of columns, where the plan has some, have come.

    They are asked for as long as a round waits, and longer while there are too few.
    """
    asking = session.asking
    if asking is None:
        return True
    begun, end = 0.0, time.monotonic() + config.patience
    while not here.stop.asked and time.monotonic() < end:
        everybody = asking.wait(0.5)
        if not begun and len(session.wait_for_sites(0)) >= config.minimum:
            begun = time.monotonic()
        late = begun and time.monotonic() - begun > config.deadline
        if (everybody or late) and len(asking.sent) >= session.least:
            plan, warning = asking.read()
            keep(here.kept.path, plan)
            session.settle(plan)
            here.report.say(
                f"columns are scaled by private {plan.statistics} of all sites: {statistics.words(plan)}"
            )
            if warning:
                here.report.say(warning)
            return True
        if everybody:
            break
    return False


def own_data(config: ServeConfig, plan: Plan) -> Data | None:
    """The server's own test data, where it has some: its classes are those of all sites."""
    if config.dataset is None:
        return None
    data: Data = config.dataset.load(config.seed)
    prepared.agreed(data, config.dataset)
    prepared.same_names(data, config.columns, config.classes)
    statistics.agreed(plan, data)
    return data


def own_test(data: Data | None, plan: Plan) -> Dataset | None:
    """Their test rows, scaled as those of sites."""
    if data is None:
        return None
    return data.test if data.asks is None else statistics.scaled(plan, data.asks).test


def make_plan(config: ServeConfig, run: str) -> Plan:
    """What the sites are told."""
    return Plan(
        run=run,
        **modelled(config),
        model_args=config.model_args,
        lora=config.lora,
        kind=config.kind,
        loss=DEFAULTS[config.kind][0] if config.loss == "auto" else config.loss,
        step=config.step,
        eval_step=config.eval_step,
        strategy=config.strategy,
        aggregator=config.aggregator,
        channel=config.channel,
        optimizer=config.optimizer,
        optimizer_args=config.optimizer_args,
        privacy=config.privacy and config.plan,
        columns=config.columns,
        classes=config.classes,
        standardize=config.standardize,
        statistics=config.statistics,
        rounds=config.rounds,
        **config.training() | {"lr": config.lr or config.plan.default_lr},
    )


def modelled(config: ServeConfig) -> dict[str, Any]:
    """The plan's model and the facts that it is built from."""
    shape, outputs = tuple(config.input_shape), config.outputs
    if not config.model.startswith(PREFIX):
        facts = facts_of(shape, outputs, config.kind) if shape else {}
        return {"model": config.model, "facts": facts}
    known = tokens.facts(config.model, config.language)
    outputs = known["vocab_size"] if config.language else outputs
    cut = {"tokens": tokens.vocabulary_digest(config.model)}
    facts = facts_of(shape, outputs, config.kind) | known | cut
    del facts["tokenizer"]
    return {"model": huggingface.public_name(config.model), "facts": facts, "place": config.model}


def keep(folder: Path, plan: Plan) -> None:
    """Write what a run that goes on must offer as before."""
    told = {"run": plan.run, "center": plan.center, "width": plan.width}
    disk.replace(folder / "sites.json", json.dumps(told) + "\n")


def known(folder: Path, resume: bool) -> dict[str, Any]:
    """The run's name towards the sites and how columns are scaled, of a new run or one that goes on."""
    if not resume:
        return {"run": secrets.token_hex(8)}
    try:
        told = json.loads(disk.regular(folder / "sites.json").read_text())
        return {"run": str(told["run"]), "center": told["center"], "width": told["width"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(f"{folder} holds no run of sites ({e})") from e


def calibrated(plan: Plan, folder: Path) -> Plan:
    """The plan of a run that goes on: its noise is for the rounds that were planned at first."""
    saved = checkpoint.load(folder / "checkpoints").get("privacy")
    if not saved or plan.privacy is None or plan.privacy.target is None:
        return plan
    return replace(plan, privacy=replace(plan.privacy, rounds=saved["rounds"]))
