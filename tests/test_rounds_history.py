"""History drawn: a panel for each figure, over its own rounds, with clients' range."""

import pytest

from fedtorch import ConfigError
from fedtorch.rounds.history import History

ROUNDS = [
    {"round": 0, "test_loss": 3.0, "test_accuracy": 0.1},
    {"round": 1, "train_loss": 2.5, "privacy_epsilon": 1.0, "cohort": ["a"]},
    {"round": 2, "train_loss": 2.0, "privacy_epsilon": 1.5, "test_loss": 2.0, "test_accuracy": 0.5}
    | {"validation_loss": 2.1, "validation_loss_min": 1.0, "validation_loss_max": 3.0},
]


def test_losses_scores_and_epsilon_are_drawn_over_their_rounds():
    figure = History(ROUNDS).plot()
    drawn = {
        a.get_title(): {n.get_label(): n.get_xydata().tolist() for n in a.lines}
        for a in figure.axes
    }
    assert drawn["accuracy"] == {"test accuracy": [[0, 0.1], [2, 0.5]]}
    assert drawn["loss"]["train loss"] == [[1, 2.5], [2, 2.0]]
    assert drawn["loss"]["validation loss"] == [[2, 2.1]] and len(figure.axes[0].collections) == 1
    assert drawn["epsilon"] == {"privacy epsilon": [[1, 1.0], [2, 1.5]]}
    assert figure._repr_png_().startswith(b"\x89PNG")  # a notebook shows it


def test_figures_are_asked_for_by_name():
    figure = History(ROUNDS).plot("train_loss", "validation_loss")
    assert [a.get_title() for a in figure.axes] == ["train loss", "validation loss"]
    with pytest.raises(
        ConfigError, match="no round has a figure 'tst_loss'; did you mean 'test_loss'"
    ):
        History(ROUNDS).plot("tst_loss")
    with pytest.raises(ConfigError, match="no round has a figure 'cohort'"):
        History(ROUNDS).plot("cohort")
    with pytest.raises(ConfigError, match="no round was trained"):
        History().plot()


@pytest.mark.parametrize("figure", ["round", "test_accuracy"])
def test_a_number_that_no_float_holds_is_damage_named_by_its_line(tmp_path, figure):
    lines = ['{"round": 1}', f'{{"round": 2, "{figure}": {"9" * 400}}}', '{"round": 3}', ""]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"metrics.jsonl is damaged in line 2"):
        History.load(tmp_path)
