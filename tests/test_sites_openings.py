"""Whose sums a site has let be opened: what is on disk when it signs, and what it will not sign after."""

import os

import pytest

from fedtorch.sites.openings import Openings
from fedtorch.types import ConfigError

ALL = ["a", "b", "c", "d", "e", "f", "g"]


def refused(openings, round, names, noised=False, run="r"):
    return openings.refusal(run, round, names, noised)


def test_a_round_done_again_is_signed_only_where_two_sums_show_no_single_update(tmp_path):
    made = Openings(tmp_path)
    assert refused(made, 4, ALL) is None
    made.keep("r", 4, ALL)
    assert refused(made, 4, ALL[::-1]) is None  # the same sites, in whatever order
    for gone in (1, 2):
        why = refused(made, 4, ALL[:-gone])
        assert "opened before" in why and f"differ by {gone}" in why
    assert "differ by 2" in refused(made, 4, [*ALL[:-1], "h"])  # one out, one in
    assert refused(made, 4, ALL[:-2], noised=True) is None
    assert refused(made, 4, ALL, run="another") is None
    # by three once, and never again
    assert refused(made, 4, ALL[:-3]) is None
    made.keep("r", 4, ALL[:-3])
    assert refused(made, 4, ALL[3:]) is not None
    assert refused(made, 4, ALL[:-3]) is None and refused(made, 4, ALL) is None


def test_rounds_never_go_back_to_one_that_was_passed_over(tmp_path):
    made = Openings(tmp_path)
    for round in (0, 3):
        made.keep("r", round, ALL)
    assert "passed over" in refused(made, 2, ALL)
    assert refused(made, 0, ALL) is None and refused(made, 4, ALL[:3]) is None
    assert refused(made, 2, ALL, noised=True) is None


def test_what_was_signed_outlives_the_process_and_half_a_line_was_never_signed(tmp_path):
    made = Openings(tmp_path)
    made.keep("r", 0, ALL)
    made.keep("r", 0, ALL)
    assert made.path.read_text().count("\n") == 1
    with made.path.open("ab") as file:
        file.write(b'["r", 1, ["a", "b')  # killed while it wrote
    again = Openings(tmp_path, begun=True)
    assert refused(again, 0, ALL[:-1]) and refused(again, 1, ALL[:3]) is None
    again.keep("r", 1, ALL[:3])
    third = Openings(tmp_path)
    assert third.runs == again.runs and len(third.runs["r"]) == 2


def test_a_line_is_on_disk_before_keep_returns(tmp_path, monkeypatch):
    made, synced = Openings(tmp_path), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (synced.append(made.path.read_text()), real(n)))
    made.keep("r", 0, ALL)
    assert synced and synced[-1] == made.path.read_text() != ""


@pytest.mark.parametrize("text", ["x\n", '["r", "0", []]\n', '["r", 0]\n', "[]\n", '["r", 1, 2]\n'])
def test_a_damaged_list_is_one_sentence(tmp_path, text):
    (tmp_path / "openings.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="put the state folder back"):
        Openings(tmp_path)


def test_a_list_that_is_gone_is_named_where_there_was_one(tmp_path):
    with pytest.raises(ConfigError, match="--lost-state true"):
        Openings(tmp_path, begun=True)
    assert Openings(tmp_path).runs == {}
    Openings(tmp_path, begun=True)


def test_a_full_disk_is_one_sentence_and_nothing_counts_as_signed(tmp_path, monkeypatch):
    made = Openings(tmp_path)

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left"):
            made.keep("r", 0, ALL)
    assert refused(made, 0, ALL[:3]) is None
    made.keep("r", 0, ALL[:3])
    assert Openings(tmp_path).runs == made.runs
