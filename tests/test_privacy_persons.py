"""Examples that belong to one person are found, bounded, and priced together."""

import json
from contextlib import closing

import numpy as np
import pandas
import pytest
import torch
from torch import nn

from fedtorch import Client, Recipe, Server
from fedtorch.__main__ import main
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel, persons
from fedtorch.privacy.accounting import claims
from fedtorch.run.report import claim
from fedtorch.types import ConfigError

WHO = [["ann", "ann", "bob", "eve"], ["ann", "bob", "bob"], ["eve", "dan", "dan", "dan"]]


def clients(who=WHO):
    torch.manual_seed(0)
    return [
        Client(f"c{k}", (torch.randn(len(w), 2), torch.randint(0, 2, (len(w),))), persons=w)
        for k, w in enumerate(who)
    ]


def test_persons_that_nobody_exceeds_everywhere_are_kept():
    assert sorted(persons.holdings(clients(), "example")) == [(2, 1), (3,)]
    assert persons.holdings(clients(), "client") == [(2,)]
    assert persons.holdings([Client("c", (torch.randn(3, 2), torch.zeros(3)))], "example") == []
    with pytest.raises(
        ConfigError, match="persons must name one for each of its 3 examples, got 2"
    ):
        Client("c", (torch.randn(3, 2), torch.zeros(3)), persons=["a", "b"])


@pytest.mark.parametrize(
    "who",
    [
        [["7", "Ann  Lee", "9"], ["7.0", "ann lee "], ["07", "9.50"]],
        [[7, 8, 9], np.array([7.0, 1.0]), torch.tensor([7, 2])],
        [np.array(["7", "8"]), pandas.Series([7.0, 1.0]), [7]],
        [["1" * 40, "2"], ["1" * 40 + ".0"], ["1" * 40, "1" * 39 + "2"]],
    ],
    ids=["texts", "arrays", "columns", "long"],
)
def test_one_person_is_one_however_the_clients_write_the_name(who):
    assert max(persons.holdings(clients(who), "example")) == (1, 1, 1)


@pytest.mark.parametrize(
    "who", [["a", None], [1.0, float("nan")], [0.5, 1.0], "ab", 3, [True, ()]], ids=str
)
def test_what_names_nobody_is_refused(who):
    with pytest.raises(ConfigError, match="client 'c': persons must be"):
        Client("c", (torch.randn(2, 2), torch.zeros(2)), persons=who)


def trained(plan):
    with closing(Server(nn.Linear(2, 2), clients(), Recipe(privacy=plan, lr=1.0))) as server:
        server.round()
        return claim(server.private, server.clients), server.private.ledger.most()


def test_the_dearest_person_is_priced():
    plan = SampleLevel(noise_multiplier=2.0, rounds=1, sample_rate=0.5, steps=2, batch_size=2)
    found, events = trained(plan)
    assert found["user_level"]["examples_of_a_person_at_most"] == 3
    assert found["user_level"]["which_is"] == "counted from the data, and so not private"
    dearest = max(
        claims.epsilon_of([(e, k) for k in one for e in events], 1e-5) for one in [(2, 1), (3,)]
    )
    assert found["user_level"]["epsilon"] == dearest > found["epsilon_replace_one"]


def test_a_bound_is_public_and_is_held():
    options = {"noise_multiplier": 2.0, "rounds": 1, "sample_rate": 0.5, "steps": 2}
    strict, _ = trained(SampleLevel(**options, strict=True))
    assert strict["user_level"] is None
    bounded, events = trained(SampleLevel(**options, strict=True, person=4))
    assert bounded["user_level"] == {
        "examples_of_a_person_at_most": 4,
        "epsilon": claims.epsilon_of([(e, 4) for e in events], 1e-5),
        "which_is": "a public bound",
    }
    with pytest.raises(
        ConfigError, match=r"privacy\.person 2 is less than the 3 examples that one"
    ):
        Server(nn.Linear(2, 2), clients(), Recipe(privacy=SampleLevel(**options, person=2)))


def test_other_plans():
    client = ClientLevel(noise_multiplier=2.0, rounds=1, rate=1.0)
    found, events = trained(client)
    assert found["user_level"]["clients_of_a_person_at_most"] == 2
    assert found["gaussian_mu"] == 0.5
    assert found["user_level"]["epsilon"] == claims.epsilon_of([(e, 2) for e in events], 1e-5)
    local, events = trained(LocalDP(noise_multiplier=2.0, rounds=1))
    assert local["epsilon_replace_one"] == claims.epsilon_of([(e, 1) for e in events], 1e-5)


def test_a_column_of_a_table_says_who(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [f"p{i % 9},{i % 3},{i * 7 % 5},{i % 2}\n" for i in range(60)]
    (tmp_path / "t.csv").write_text("patient,ward,age,y\n" + "".join(rows))
    words = ["train", "--dataset", "csv", "--dataset.path", "t.csv", "--dataset.person", "patient"]
    words += ["--dataset.client", "ward", "--dataset.kind", "classification", "--rounds", "1"]
    words += ["--dataset.bounds", "age=0:5", "--tracking", "none", "--run-dir", "run"]
    assert main(words) == 0
    said = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert 4 <= said["user_level"]["examples_of_a_person_at_most"] <= 7
    assert "for a person with up to" in capsys.readouterr().out
    assert '"patient"' not in (tmp_path / "run" / "data.json").read_text()
    assert main([*words[:-1], "other", "--privacy.person", "2"]) == 2
    assert "privacy.person 2 is less than" in capsys.readouterr().err
    assert main([*words[:-1], "other", "--dataset.person", "nobody"]) == 2
    assert "has no person column 'nobody'" in capsys.readouterr().err
