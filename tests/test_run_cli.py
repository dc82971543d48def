import json
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtorch import (
    QSGD,
    ConfigError,
    FedProx,
    Scaffold,
    ServerAdam,
    ServerYogi,
    Sign,
    Strategy,
    TopK,
    Uniform,
)
from fedtorch.commands.train import train_module
from fedtorch.data import Csv, Digits, Dirichlet, Natural
from fedtorch.options import as_typed, find
from fedtorch.run import cli, objects
from fedtorch.run.names import CHOICES
from fedtorch.sites.options import ServeConfig, SiteConfig

Config = train_module().Config


def parse(*argv: str) -> Any:
    return cli.parse(Config, argv)


def test_flags_become_objects():
    config = parse(
        "--strategy", "fedprox", "--strategy.mu", "0.5", "--strategy.server=adam",
        "--strategy.server.lr", "0.03", "--participation", "uniform",
        "--participation.cohort-size", "3", "--rounds", "7", "--drop-last", "--lr=1e-2",
        "--model.hidden", "64", "--optimizer", "adam", "--optimizer.betas", "[0.9, 0.99]",
    )  # fmt: skip
    assert config.strategy == FedProx(mu=0.5, server=ServerAdam(lr=0.03))
    assert config.participation == Uniform(cohort_size=3)
    assert (config.rounds, config.lr, config.drop_last) == (7, 0.01, True)
    assert config.model_args == {"hidden": 64}
    assert (config.optimizer, config.optimizer_args) == ("adam", {"betas": [0.9, 0.99]})
    for betas in ("0.9,0.99", "(0.9, 0.99)", "9e-1 , .99"):
        config = parse("--optimizer", "adam", "--optimizer.betas", betas)
        assert config.optimizer_args == {"betas": [0.9, 0.99]}


def test_options_may_come_before_the_choice_they_belong_to():
    assert parse("--strategy.mu", "2", "--strategy", "fedprox").strategy == FedProx(mu=2.0)


def test_flags_override_the_file_and_another_choice_drops_the_files_options(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'rounds = 5\nlr = 0.3\n[strategy]\nname = "fedprox"\nmu = 0.7\n'
        '[dataset]\nname = "csv"\npath = "a.csv"\n[partition]\nname = "natural"\n'
    )
    config = parse("--config", str(path), "--rounds", "9", "--strategy.mu", "0.2")
    assert (config.rounds, config.lr, config.strategy) == (9, 0.3, FedProx(mu=0.2))
    assert (config.dataset, config.partition) == (Csv("a.csv"), Natural())
    other = parse("--config", str(path), "--strategy", "scaffold")
    assert other.strategy == Scaffold()
    same = parse("--config", str(path), "--strategy", "fedprox")
    assert same.strategy == FedProx(mu=0.7)


def test_null_is_none():
    assert parse("--batch-size", "null").batch_size is None
    assert parse("--partition", "none").partition is None
    assert parse("--steps", "4", "--clients", "null").clients is None


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--batch-size", "null", "--clients", "3"],
        ["--strategy", "scaffold", "--strategy.server", "yogi", "--strategy.server.tau", "0.1"],
        ["--dataset", "csv", "--dataset.path", 'a "quoted" name.csv', "--dataset.client", "c"],
        ["--model", "a/b.py:C", "--model.width", "3", "--model.name", "x", "--metrics", "a.b,mae"],
        ["--partition", "dirichlet", "--partition.alpha", "0.1", "--schedule", "step"],
        ["--channel", "topk:0.03"],
        ["--channel", "powersgd,topk,qsgd:7", "--channel.bucket", "null", "--channel.rank", "3"],
    ],
)
def test_what_is_described_builds_the_same_config_again(argv, tmp_path):
    import tomli_w

    config = parse(*argv)
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(objects.describe(config)), encoding="utf-8")
    again = parse("--config", str(path), "--trust-code")
    for f in fields(Config):
        assert getattr(again, f.name) == getattr(config, f.name), f.name


def test_describing_a_config_imports_no_class_that_it_has_not(monkeypatch):
    asked = []
    monkeypatch.setattr(objects, "find", lambda path: asked.append(path) or find(path))
    config = parse("--strategy", "fedprox", "--channel", "topk")
    objects.describe(config)
    own = {type(getattr(config, f.name)).__name__ for f in fields(config)} | {"TopK"}
    assert {path.rpartition(".")[2] for path in asked} <= own
    named = [path for names in CHOICES.values() for path in names.values()]
    assert all(find(path).__name__ == path.rpartition(".")[2] for path in named)


@dataclass(frozen=True)
class Shifted(Strategy):
    """A strategy of the user's own."""

    amount: float = 1.0


def test_a_class_of_ones_own_goes_by_its_dotted_path():
    own = parse("--strategy", f"{__name__}.Shifted", "--strategy.amount", "3")
    assert own.strategy == Shifted(amount=3.0)
    assert objects.describe(own)["strategy"]["name"] == f"{__name__}.Shifted"


NAMES = [
    ('strategy = "ran.Code"', "strategy = 'ran.Code'"),
    ('[strategy]\nname = "ran:Code"', "strategy = 'ran:Code'"),
    ('strategy = { name = "fedavg", server = "ran.Code" }', "strategy.server = 'ran.Code'"),
    ('[strategy.server]\nname = "ran.Code"', "strategy.server = 'ran.Code'"),
    ('privacy = { name = "client", adaptive = "ran.Code" }', "privacy.adaptive = 'ran.Code'"),
    ('privacy = "ran.Code"', "privacy = 'ran.Code'"),
    ('partition = "ran.Code"', "partition = 'ran.Code'"),
    ('participation = "ran.Code"', "participation = 'ran.Code'"),
    ('schedule = "ran.Code"', "schedule = 'ran.Code'"),
    ('tracking = "ran.Code"', "tracking = 'ran.Code'"),
    ('channel = "topk:0.1,ran.Code"', "channel = 'ran.Code'"),
    ('channel = [{ name = "topk" }, "ran:Code", { name = "a.B" }]', "channel = 'ran:Code,a.B'"),
    ('engine = "ran.Code"', "engine = 'ran.Code'"),
    ('dataset = "ran.Code"', "dataset = 'ran.Code'"),
    ('dataset = { name = "custom", path = "ran:make" }', "dataset.path = 'ran:make'"),
    ('dataset = { name = "Custom", path = "ran:make" }', "dataset.path = 'ran:make'"),
    ('engine = { name = "ray", address = "ray://there:1" }', "engine.address = 'ray://there:1'"),
    ('model = "ran.py:Code"', "model = 'ran.py:Code'"),
    ('model = "ran:Code"', "model = 'ran:Code'"),
    ('model = "../ran"', "model = '../ran'"),
    ('model = { name = "./ran.py", width = 3 }', "model = './ran.py'"),
    ('optimizer = "ran.Code"', "optimizer = 'ran.Code'"),
    ('loss = "ran:code"', "loss = 'ran:code'"),
    ('step = "ran:code"', "step = 'ran:code'"),
    ('eval_step = "ran:code"', "eval_step = 'ran:code'"),
    ('steps = ["ran:code"]', "steps = 'ran:code'"),
    ('metrics = ["accuracy", "ran:code"]', "metrics = 'ran:code'"),
    ('metrics = "accuracy,ran.code"', "metrics = 'ran.code'"),
    ('[model]\nname = "mlp"\n[model.act]\nclass_path = "ran.Code"', "model.act.class_path = 'ran.Code'"),
]  # fmt: skip


@pytest.mark.parametrize("text, names", NAMES)
def test_what_only_a_file_names_is_never_imported_unasked(tmp_path, monkeypatch, text, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("ran.py").write_text("from pathlib import Path\nPath('traces').touch()\n")
    Path("c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", "c.toml")
    assert f"c.toml names code to import and run: {names}; add --trust-code" in str(caught.value)
    with pytest.raises(ConfigError, match="the run's config names code"):
        cli.resumed_config(Config, ["--run-dir", "x"], Path("c.toml"), set())
    assert not Path("traces").exists()


def test_stages_come_in_order_each_with_what_stands_behind_its_colon():
    two = parse("--channel", "topk:0.01,QSGD", "--channel.levels", "3").channel
    assert two == (TopK(share=0.01), QSGD(levels=3))
    assert parse("--channel", "none").channel == parse().channel == ()
    assert parse("--channel.share", "0.5").channel == (TopK(share=0.5),)


def test_options_of_a_list_in_a_file_are_given_with_the_list(tmp_path):
    (tmp_path / "c.toml").write_text('channel = [{ name = "topk", share = 0.2 }, "sign"]')
    file = ["--config", str(tmp_path / "c.toml")]
    assert parse(*file).channel == (TopK(share=0.2), Sign())
    assert parse(*file, "--channel", "sign").channel == (Sign(),)
    with pytest.raises(ConfigError, match="given beside a list of channel: give the whole list"):
        parse(*file, "--channel.share", "0.5")


def test_what_is_typed_is_trusted_and_overrides_the_file(tmp_path):
    (tmp_path / "c.toml").write_text(f'strategy = "{__name__}.Shifted"\nloss = "no.such:loss"')
    file = ["--config", str(tmp_path / "c.toml")]
    with pytest.raises(ConfigError, match=r"loss = 'no\.such:loss'"):
        parse(*file, "--strategy", f"{__name__}.Shifted")
    typed = parse(*file, "--strategy", f"{__name__}.Shifted", "--loss", "my:loss")
    assert (typed.strategy, typed.loss) == (Shifted(), "my:loss")
    assert parse(*file, "--trust-code").loss == "no.such:loss"
    with pytest.raises(ConfigError, match="takes no value"):
        parse(*file, "--trust-code=perhaps")


@pytest.mark.parametrize("choice", sorted(CHOICES))
def test_a_class_that_is_not_what_a_choice_asks_for_is_never_made(choice):
    table: dict[str, Any] = {}
    cli.put(table, choice.split("."), f"{__name__}.Touch")
    if choice.startswith("privacy."):
        table["privacy"]["name"] = "client"
    if choice == "aggregator.pre":
        table["aggregator"]["name"] = "krum"
    if choice == "pace.clock":
        table["pace"]["name"] = "buffered"
    with pytest.raises(ConfigError, match=f"Touch' is no {choice}: it must be a"):
        objects.construct(Config, table)
    assert not Touch.made


class Touch:
    """Anything that does something when it is made."""

    made = 0

    def __init__(self, *_: object, **__: object) -> None:
        Touch.made += 1


@pytest.mark.parametrize(
    "argv, message",
    [
        (["rounds"], "unexpected argument 'rounds': options start with --"),
        (["-r", "3"], "unexpected argument '-r'"),
        (["--round", "3"], "unknown option --round; did you mean --rounds?"),
        (["--batchsize", "3"], "unknown option --batchsize; did you mean --batch-size?"),
        (["--eval-evry", "3"], "did you mean --eval-every?"),
        (["--dataset-path", "x"], "unknown option --dataset-path; did you mean --dataset.path?"),
        (["--no-drop-last"], "unknown option --no-drop-last; write --drop-last false, or none"),
        (["--xyz", "3"], "unknown option --xyz; --help lists them"),
        (
            ["mnist"],
            "unexpected argument 'mnist': options start with --; did you mean --dataset mnist?",
        ),
        (["run.toml"], "did you mean --config run.toml?"),
        (["rows.csv"], "did you mean --dataset csv --dataset.path rows.csv?"),
        (["\u2013\u2013rounds", "3"], "did you mean --rounds?"),
        (["--learning-rat", "1"], "unknown option --learning-rat; did you mean --lr?"),
        (["--csv", "rows.csv"], "unknown option --csv; did you mean --dataset csv?"),
        (["--sites", "a,b"], "unknown option --sites; fedtorch serve has it"),
        (["--max-epsilon", "3"], "unknown option --max-epsilon; fedtorch site has it"),
        (["-lr", "1"], "did you mean --lr?"),
        (["--rounds="], "rounds: expected int, got nothing"),
        (["--strategy", "fedagv"], "; did you mean fedavg or qfedavg?"),
        (["--strategy", "fedbuff"], "; did you mean fedavg with --pace buffered?"),
        (["--privacy", "dpsgd"], "; did you mean sample?"),
        (["--strategy", "fedprox", "--strategy.muu", "1"], "; did you mean mu?"),
        (
            ["--strategy.server", "adam", "--strategy.server.learning-rate", "1"],
            "; did you mean lr?",
        ),
        (
            ["--strategy", "none"],
            "strategy cannot be left out: fedavg is what a run has without it",
        ),
        (
            ["--dataset", "pyproject.toml"],
            "is where data lie, and no kind of data: --dataset csv --data",
        ),
        (["--rounds"], "--rounds needs a value"),
        (["--rounds", "--lr", "3"], "--rounds needs a value"),
        (["--rounds", "x"], "rounds: expected int, got x"),
        (["--drop-last", "maybe"], "drop_last: expected bool, got maybe"),
        (["--strategy", "prox"], "unknown strategy 'prox'; there are fedavg, fedprox, scaffold"),
        (["--pace.size", "3"], "has no option 'size'; it has clock (--pace buffered has it)"),
        (
            ["--strategy", "scaffold", "--strategy.option", "3"],
            "strategy.option: expected one of 1, 2, got 3",
        ),
        (["--strategy.m", "1"], "strategy fedavg has no option 'm'; it has server, weighting"),
        (["--strategy", "fedprox", "--strategy.mu", "x"], "strategy.mu: expected float, got x"),
        (
            ["--strategy.server", "sgd", "--strategy.server.momentun", "1"],
            "has no option 'momentun'",
        ),
        (["--schedule", "no.such.Schedule"], "cannot import 'no.such.Schedule'"),
        (["--lr.x", "1"], "lr: expected float"),
        (["--channel", "sign:3"], "channel sign has no option to stand behind a colon"),
        (["--strategy", "ditto", "--strategy.lam", "nan"], "strategy.lam: must be finite, got nan"),
        (["--threat.liars", "2"], "threat.liars without --threat: name one of sign-flip, gauss"),
        (["--channel", "topk:a"], "channel.share: expected float, got a"),
        (
            ["--channel", "topk,randk", "--channel.share", "0.1"],
            "channel.share is for topk or randk",
        ),
        (
            ["--channel", "topk:0.1", "--channel.share", "0.2"],
            "channel.share is for topk, or given twice",
        ),
        (["--channel", "topk,qsgd", "--channel.rank", "2"], "has no option 'rank'"),
        (
            ["--channel", "none", "--channel.share", "1"],
            "channel is none, which has no channel.share",
        ),
    ],
)
def test_mistakes_are_one_sentence(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["off", "none", "No", "false", "null"])
def test_what_can_be_left_out_is_turned_off(word):
    config = parse("--privacy", word, "--tracking", word, "--channel", word, "--partition", word)
    assert (config.privacy, config.tracking, config.channel, config.partition) == (
        None,
        None,
        (),
        None,
    )


def test_names_of_elsewhere_that_mean_the_same_are_taken(tmp_path):
    assert parse("--strategy", "FedAdam").strategy == parse("--strategy.server", "adam").strategy
    own = parse("--strategy", "fedadam", "--strategy.server.lr", "0.5").strategy
    assert own.server == ServerAdam(lr=0.5)
    (tmp_path / "c.toml").write_text('strategy = "fedadam"\nparticipation = "all"')
    assert parse("--config", str(tmp_path / "c.toml")).strategy.server == ServerAdam()


def test_the_same_choice_by_another_name_keeps_its_options(tmp_path):
    (tmp_path / "c.toml").write_text(
        '[pace]\nname = "asynchronous"\nmixing = 0.4\n[strategy]\nname = "FedAvg"\n'
        'server = {name = "adam", lr = 0.5}\n[participation]\nname = "everyone"\ndropout = 0.1\n'
    )
    file = ("--config", str(tmp_path / "c.toml"))
    config = parse(*file, "--pace", "FedAsync", "--strategy", "fedadam", "--participation", "all")
    assert config == parse(*file)
    assert config.pace.mixing == 0.4 and config.strategy.server.lr == 0.5
    other = parse(*file, "--strategy", "fedyogi", "--strategy.weighting", "uniform").strategy
    assert other.server == ServerYogi() and other.weighting == "uniform"


def test_options_of_elsewhere_are_taken_for_ours_and_said(capsys):
    words = "--learning-rate 0.5 --output=here --hidden 4 --rounds 2 --sweep learning_rate=1,2"
    assert cli.renamed(words.split(), Config) == (
        [
            "--lr",
            "0.5",
            "--run_dir=here",
            "--model.hidden",
            "4",
            "--rounds",
            "2",
            "--sweep",
            "lr=1,2",
        ]
    )
    assert capsys.readouterr().err.splitlines() == [
        "note: --learning-rate is --lr here",
        "note: --output is --run-dir here",
        "note: --hidden is --model.hidden here",
        "note: learning_rate is lr here",
    ]
    # a command that has an option of that name means it
    assert cli.renamed(["--device", "cpu"], SiteConfig) == ["--device", "cpu"]
    assert cli.renamed(["--device", "cpu"], Config) == ["--engine.device", "cpu"]
    assert cli.renamed(["--max-epsilon", "1", "x=1"], SiteConfig) == ["--max-epsilon", "1", "x=1"]


def test_a_switch_of_a_choice_needs_no_value():
    assert parse("--privacy.strict", "--rounds", "3").privacy.strict
    assert not parse("--privacy.strict", "false").privacy.strict
    with pytest.raises(ConfigError, match=r"--privacy\.epsilon needs a value"):
        parse("--privacy.epsilon", "--rounds", "3")


def test_options_come_back_as_they_were_typed():
    said = "batch_size must be at least 1; see privacy.batch_size and xbatch_size"
    assert as_typed(said, ["--batch-size", "0"]) == (
        "--batch-size must be at least 1; see privacy.batch_size and xbatch_size"
    )
    assert (
        as_typed("dataset.path must be a file", ["--dataset.path=x"])
        == "--dataset.path must be a file"
    )
    assert (
        as_typed("dataset.path/x and run_dir", ["--dataset.path", "x"])
        == "--dataset.path/x and run_dir"
    )


@given(st.lists(st.text(min_size=1, max_size=12), max_size=5))
def test_no_words_make_anything_but_a_config_or_a_sentence(words):
    try:
        parse(*words)
    except ConfigError as e:
        assert str(e)


@given(
    st.lists(
        st.tuples(
            st.sampled_from([f.name for f in fields(Config)] + ["strategy.server", "model.x"]),
            st.text(max_size=8),
        ),
        max_size=4,
    )
)
def test_no_value_makes_anything_but_a_config_or_a_sentence(pairs):
    try:
        parse(*(f"--{name}={value}" for name, value in pairs))
    except ConfigError as e:
        assert str(e)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rounds = ", "is not TOML"),
        ("rounds = 3\nrounds = 4", "is not TOML"),
        ("learning_rate = 1.0", "the config has no option 'learning_rate'; it has lr, epochs"),
        ('[strategy]\nname = "fedprox"\nm = 1', "strategy fedprox has no option 'm'"),
        ("strategy = 3", "unknown strategy '3'"),
        ("rounds = [1, 2]", "rounds: expected int"),
    ],
)
def test_files_with_mistakes_are_one_sentence(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(tmp_path / "c.toml"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["../../etc/passwd", "..a.b", ".x", "a..b"])
def test_a_path_of_files_is_no_class(path):
    with pytest.raises(ConfigError, match="cannot import"):
        find(path)


def test_files_that_are_not_there_or_not_text(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        parse("--config", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match="is not TOML"):
        parse("--config", str(tmp_path / "b.toml"))


def test_home_is_home_in_a_file_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = (
        'run_dir = "~/runs/a"\nmodel = "~/net.py:Net"\ndataset = { name = "csv", path = "~/t.csv" }'
    )
    (tmp_path / "c.toml").write_text(text)
    config = parse("--config", str(tmp_path / "c.toml"), "--trust-code")
    assert (config.run_dir, config.dataset.path) == (f"{tmp_path}/runs/a", f"{tmp_path}/t.csv")
    assert config.model == f"{tmp_path}/net.py:Net"
    assert parse("--run-dir=~").run_dir == str(tmp_path)


@dataclass(frozen=True)
class Tiny:
    """Free options are read as TOML values would be."""

    model: str = "m"
    model_args: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("0.5", 0.5),
        (".5", 0.5),
        ("true", True),
        ("True", True),
        ("[1, 2]", [1, 2]),
        ("relu", "relu"),
        ("null", None),
        ('{"a": 1}', {"a": 1}),
    ],
)
def test_free_options_keep_their_type(text, value):
    assert objects.construct(Tiny, {"model": {"name": "m", "a": text}}).model_args == {"a": value}


def test_a_config_may_name_a_partition_with_options(tmp_path):
    Path(tmp_path / "c.toml").write_text('partition = { name = "dirichlet", alpha = 0.2 }')
    assert parse("--config", str(tmp_path / "c.toml")).partition == Dirichlet(alpha=0.2)


def test_a_tilde_is_the_home_folder_also_where_no_shell_sees_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    file = tmp_path / "run.toml"
    file.write_text('run_dir = "~/runs/a"\n[dataset]\nname = "csv"\npath = "~/t.csv"\n')
    config = cli.parse(train_module().Config, ["--config", str(file), "--model=~/m.py:Net"])
    assert config.run_dir == "/home/somebody/runs/a"
    assert config.dataset.path == "/home/somebody/t.csv"
    assert config.model == "/home/somebody/m.py:Net"
    assert objects.home("~") == "/home/somebody"
    assert objects.home("a~/b") == "a~/b"


@pytest.mark.parametrize("inside", ["a table", "its text"])
@pytest.mark.parametrize("option", ["model", "model_args", "optimizer_args"])
def test_a_class_named_among_free_options_is_not_imported(tmp_path, monkeypatch, option, inside):
    (tmp_path / "of_others.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    named = {"class_path": "of_others.Thing", "init_args": {}}
    given = {"x": named if inside == "a table" else json.dumps(named)}
    config = objects.construct(train_module().Config, {option: given})
    free = config.optimizer_args if option == "optimizer_args" else config.model_args
    assert free["x"] in (named, given["x"])
    assert "of_others" not in sys.modules


def test_a_table_of_free_options_may_be_text_and_must_be_a_table():
    config = train_module().Config
    assert objects.construct(config, {"model_args": '{"hidden": 8}'}).model_args == {"hidden": 8}
    with pytest.raises(ConfigError, match="model_args must be a table of options"):
        objects.construct(config, {"model_args": "8"})


def test_options_without_a_name_are_those_of_the_default():
    given = ["--name", "a", "--insecure", "--dataset.path", "a.csv"]
    assert cli.parse(SiteConfig, given).dataset == Csv(path="a.csv")
    assert parse("--dataset.test-fraction", "0.3").dataset == Digits(test_fraction=0.3)


@pytest.mark.parametrize("shape", ["6", "[6]", "1,28,28", "[1, 28, 28]"])
def test_whole_numbers_are_listed_with_or_without_brackets(shape):
    given = ["--sites", "a", "--insecure", "--input-shape", shape]
    assert cli.parse(ServeConfig, given).input_shape == json.loads(f"[{shape.strip('[]')}]")
    with pytest.raises(ConfigError, match="input_shape"):
        cli.parse(ServeConfig, [*given[:-1], "6,b"])


@pytest.mark.parametrize(
    "given",
    [
        "logistic,mlp",
        "logistic, mlp",
        '["logistic", "mlp"]',
        "['logistic','mlp']",
        "[logistic, mlp]",
    ],
)
def test_names_are_listed_with_or_without_quotes(given):
    asked = ["--name", "a", "--insecure", "--dataset.path", "a.csv", "--models", given]
    assert cli.parse(SiteConfig, asked).models == ["logistic", "mlp"]


def test_a_config_nested_without_end_is_not_toml(tmp_path):
    (tmp_path / "c.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="is not TOML"):
        cli.read(tmp_path / "c.toml")


def test_a_file_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("rounds = 5\n", encoding="utf-8-sig")
    assert parse("--config", str(path)).rounds == 5


@pytest.mark.parametrize("given", ["8", "0.5", "yes"])
def test_a_part_that_is_on_or_off_is_told_where_its_numbers_go(given):
    with pytest.raises(ConfigError, match=r"--lora is on or none, and .* such as --lora\.rank$"):
        parse("--lora", given)
