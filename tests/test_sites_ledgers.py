"""A site's own ledger: what it vouches for, what it will not exceed, and a folder that was changed."""

import json
import math

import pytest

from fedtorch import FedAvg, Recipe
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.privacy.accounting.ledger import Ledger
from fedtorch.sites.ledgers import SiteLedgers
from fedtorch.types import ConfigError, OverBudget

PLAN = SampleLevel(noise_multiplier=2.0, rounds=5)


def budget(folder, most=10.0, site="north") -> SiteLedgers:
    return SiteLedgers(folder, site, most, 1e-5)


@pytest.mark.parametrize("most", [None, 10.0], ids=["no budget", "budget"])
@pytest.mark.parametrize(
    "recipe, why",
    [
        (Recipe(FedAvg(weighting="examples"), privacy=PLAN), "weighting examples"),
        (Recipe(FedAvg(weighting="examples"), privacy=LocalDP(rounds=1)), "weighting examples"),
        (Recipe(FedAvg(weighting="examples"), privacy=ClientLevel(rounds=1)), "weighting examples"),
        (Recipe(steps=3, privacy=PLAN), "owns the steps"),
        (Recipe(drop_last=True, privacy=PLAN), "drop_last"),
        (Recipe(privacy=SampleLevel(noise_multiplier=2.0)), "how many rounds"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_site_refuses_what_a_server_refuses(tmp_path, recipe, why, most):
    with pytest.raises(ConfigError, match=why):
        budget(tmp_path, most).admit(recipe, insecure=False, derived=False)


def test_a_scale_that_every_row_moves_is_refused_where_rows_are_hidden(tmp_path):
    free = budget(tmp_path, None)
    with pytest.raises(ConfigError, match="standardize"):
        free.admit(Recipe(privacy=PLAN), insecure=False, derived=True)
    for privacy in (None, LocalDP(rounds=1), ClientLevel(rounds=1)):
        free.admit(Recipe(privacy=privacy), insecure=False, derived=True)


@pytest.mark.parametrize("most", [None, 10.0], ids=["no budget", "budget"])
def test_noise_that_hides_nothing_is_refused_and_nothing_is_entered(tmp_path, most):
    made = budget(tmp_path, most)
    for noise in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(OverBudget, match="hides nothing"):
            made.charge(PLAN, 0, noise)
    assert made.ledgers == {} and made.spent() == 0


def test_with_a_budget_no_figure_leaves_that_no_noise_covers(tmp_path):
    recipe = Recipe(privacy=PLAN)
    assert budget(tmp_path).told(recipe).privacy.strict
    assert budget(tmp_path, None).told(recipe) is recipe
    assert budget(tmp_path).told(Recipe()) == Recipe()


def test_what_is_refused_names_the_figure_that_is_enforced(tmp_path):
    one = PLAN.planned(2.0, 1)
    made = budget(tmp_path, PLAN.planned(2.0, 2) + 1e-6)
    made.charge(PLAN, 0, 2.0)
    made.charge(PLAN, 1, 2.0)
    spent = made.spent()
    assert one < spent <= made.most
    with pytest.raises(OverBudget) as e:
        made.charge(PLAN, 2, 2.0)
    assert f"cost epsilon {PLAN.planned(2.0, 3):.4f} in all" in str(e.value)
    assert f"max_epsilon {made.most:g}; so far it is {spent:.4f}" in str(e.value)
    assert made.spent() == spent == budget(tmp_path).spent()


@pytest.fixture
def used(tmp_path):
    """A state folder with three charges; the journal, and the note beside it."""
    made = budget(tmp_path)
    for k in range(3):
        made.charge(PLAN, k, 2.0)
    return tmp_path / "ledger-example.jsonl", tmp_path / "ledger-example.json"


def test_a_note_without_its_journal_is_refused(used):
    journal, _ = used
    journal.unlink()
    with pytest.raises(ConfigError, match=r"ledger-example.jsonl.*without"):
        budget(journal.parent)
    assert not journal.exists()


def test_a_journal_without_its_note_is_refused_unless_nothing_was_charged(used):
    journal, note = used
    note.unlink()
    with pytest.raises(ConfigError, match="not known without"):
        budget(journal.parent)
    journal.unlink()
    Ledger(journal)  # killed between the journal's first line and the note
    assert budget(journal.parent).spent() == 0 and note.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"header": 3}', '{"header": {}, "count": "x"}', "\x00", "null"]
)
def test_a_damaged_note_is_one_sentence(used, text):
    journal, note = used
    note.write_text(text)
    with pytest.raises(ConfigError, match="not known without"):
        budget(journal.parent)


def test_a_ledger_put_back_from_an_older_copy_is_refused(used):
    journal, _ = used
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))
    with pytest.raises(ConfigError, match="shortened"):
        budget(journal.parent)
    journal.write_text("".join(lines).replace('"round": 1', '"round": 7'))
    with pytest.raises(ConfigError, match="edited"):
        budget(journal.parent)


def test_a_state_folder_belongs_to_one_site_and_a_ledger_to_one_unit(used):
    journal, note = used
    with pytest.raises(ConfigError, match="ledger of 'north'"):
        budget(journal.parent, site="south")
    other = journal.with_name("ledger-client.jsonl")
    journal.rename(other)
    note.rename(other.with_suffix(".json"))
    with pytest.raises(ConfigError, match="unit example"):
        budget(journal.parent)


def test_notes_of_earlier_versions_are_read(used):
    journal, note = used
    saved = json.loads(note.read_text())
    assert saved.pop("site") == "north"
    note.write_text(json.dumps(saved))
    assert budget(journal.parent).spent() > 0


def test_a_full_disk_is_one_sentence_and_the_charge_stays(used, monkeypatch):
    journal, _ = used

    def full(path, text):
        raise OSError(28, "No space left on device")

    made = budget(journal.parent)
    monkeypatch.setattr("fedtorch.privacy.accounting.owned.disk.replace", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        made.charge(PLAN, 3, 2.0)
    monkeypatch.undo()
    assert len(budget(journal.parent).ledgers["example"]) == 4


def test_what_presence_costs_is_not_added_to_what_rows_cost(tmp_path):
    budget = SiteLedgers(tmp_path, "north", None, 1e-5)
    local = LocalDP(rounds=1, noise_multiplier=2.0)
    central = ClientLevel(rounds=1, noise_multiplier=2.0)
    for plan in (SampleLevel(rounds=1), local, central):
        budget.charge(plan, 0, 2.0)
    rows, data, here = (budget.ledgers[b].spent(1e-5) for b in ("example", "client", "presence"))
    assert budget.spent() == rows + data > here > 0
    for _ in range(30):
        budget.charge(central, 1, 2.0)
    assert budget.spent() == budget.ledgers["presence"].spent(1e-5) > rows + data
    again = SiteLedgers(tmp_path, "north", None, 1e-5)
    assert again.spent() == budget.spent()
    assert [len(again.ledgers[b]) for b in ("example", "client", "presence")] == [1, 1, 31]
