import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import tiny
from fedtorch import ConfigError
from fedtorch.commands.given import examples
from fedtorch.data import LabelledText, Text, tokens
from fedtorch.data.prepared import Prepared


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    tiny.letters().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    tiny.words().save_pretrained(folder)
    return str(folder)


def table(path, rows):
    path.write_text("text,label,site\n" + "".join(f"{r}\n" for r in rows))
    return str(path)


ROWS = [
    '"this film is good",yes,a',
    "bad film,no,b",
    '"a very, very great film",yes,a',
    "poor,no,b",
]


def test_windows_of_tokens_predict_the_next_and_belong_to_their_speaker(letters, tmp_path):
    (tmp_path / "play.txt").write_text(tiny.PLAY * 3)
    data = Text(str(tmp_path / "play.txt"), vocabulary=f"hf:{letters}", length=10).load(0)
    x, y = data.train.tensors
    assert x.shape[1] == 10 and torch.equal(x[:, 1:], y[:, :-1])
    assert {*data.keys} == {"ROMEO", "JULIET"}
    assert tiny.letters().decode(x[0]) in tiny.PLAY * 2
    assert data.outputs == data.facts["vocab_size"] == len(tiny.letters())
    assert data.facts["language"] and data.labels is None


def test_texts_with_a_class_are_cut_or_filled_up_in_tokens(words, tmp_path):
    path = table(tmp_path / "films.csv", ROWS)
    made = LabelledText(
        path, vocabulary=f"hf:{words}", length=5, client="site", test_fraction=0.0
    ).load(0)
    x, y = made.train.tensors
    assert made.preparation.classes == ("no", "yes") and y.tolist() == [1, 0, 1, 0]
    at = tiny.WORDS.index
    assert x[1].tolist() == [at("bad"), at("film"), 0, 0, 0]
    assert x[2].tolist() == [at("a"), at("very"), 1, at("very"), at("great")]  # 1: the comma
    assert [*made.keys] == ["a", "b", "a", "b"]
    assert made.facts["language"] is False and made.facts["padding"] == 0
    assert made.facts["vocab_size"] == len(tiny.WORDS)


def test_texts_to_be_judged_are_read_as_those_that_were_trained_on(words, tmp_path):
    path = table(tmp_path / "films.csv", ROWS)
    data = LabelledText(path, vocabulary=f"hf:{words}", length=3, test_fraction=0.0).load(0)
    (tmp_path / "new.txt").write_text("good film\n\nbad\n")
    at = tiny.WORDS.index
    want = [[at("good"), at("film"), 0], [at("bad"), 0, 0]]
    assert examples(Prepared.of(data), tmp_path / "new.txt").tolist() == want


def test_a_tokenizer_that_is_nowhere_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"there is no folder '\./none'"):
        tokens.tokenizer("hf:./none")
    with pytest.raises(ConfigError, match=r"in folder .* cannot be loaded"):
        tokens.tokenizer(str(tmp_path))
    monkeypatch.setattr(tokens, "reachable", lambda: False)
    with pytest.raises(ConfigError, match=r"'nobody/nothing', which is no folder here, .* online"):
        tokens.tokenizer("nobody/nothing")
    (tmp_path / "t.txt").write_text("some text")
    with pytest.raises(ConfigError, match="characters, bytes or hf:FOLDER, not 'words'"):
        Text(str(tmp_path / "t.txt"), vocabulary="words").load(0)


class Hub(BaseHTTPRequestHandler):
    """One that has nothing, and says so."""

    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *args):
        pass


def test_a_hub_is_there_if_it_answers_whatever_it_says(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Hub) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
        thread = threading.Thread(target=hub.handle_request)
        thread.start()
        assert tokens.reachable()
        thread.join(5)
    assert not tokens.reachable()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_model_without_a_tokenizer_beside_it_is_told(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    transformers.AutoConfig.for_model(kind).save_pretrained(
        tmp_path
    )  # one that knows no word is made up
    with pytest.raises(ConfigError, match=r"has a model but no tokenizer.*save_pretrained"):
        tokens.tokenizer(str(tmp_path))


def test_texts_of_unequal_length_need_a_token_to_fill_up_with():
    known = tiny.words()
    known.pad_token = None
    with pytest.raises(ConfigError, match="no token to fill up"):
        tokens.tokenized(known, ["good", "bad film"], 3)


def test_without_the_packages_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedtorch\[hf\]'"):
        tokens.tokenizer("hf:some/name")
