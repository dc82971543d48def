"""Models of Hugging Face over sites: each builds them from files of its own, and only adapters travel."""

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from fedtorch import Client, Local, Server, seeds
from fedtorch.data import LabelledText
from fedtorch.privacy import SampleLevel
from fedtorch.run import huggingface
from fedtorch.run.huggingface import LoRA
from fedtorch.sites import offer as plans
from fedtorch.sites.engine import Sites, remotes
from fedtorch.sites.limits import accept
from fedtorch.sites.options import ServeConfig, SiteConfig
from fedtorch.sites.serve import make_plan
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError

pytestmark = pytest.mark.timeout(180)
NAMES = ["north", "south"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The server's model, north's copy of it, and south's configuration without weights."""
    made = tmp_path_factory.mktemp("models")
    for where in ("server", *NAMES):
        tiny.bert(num_labels=2, **tiny.NONE).save_pretrained(made / where / "bert")
        tiny.words().save_pretrained(made / where / "bert")
    (made / "south/bert/model.safetensors").unlink()
    for k, name in enumerate(NAMES):
        lines = [
            f"this film {'is ' * (i % 3 + k)}{word},{mood}"
            for i in range(8)
            for word, mood in (("good", "up"), ("bad", "down"))
        ]
        (made / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    return made


def served(folder, **changes) -> ServeConfig:
    given = {"model": f"hf:{folder}/server/bert", "lora": LoRA(rank=2), "input_shape": [6]}
    given |= {"sites": NAMES, "insecure": True, "privacy": None, "lr": 0.5, "batch_size": 4}
    return ServeConfig(**given | changes)


def offer(folder, **changes) -> plans.Plan:
    return make_plan(served(folder, **changes), "test")


def texts(folder, name) -> LabelledText:
    kept = {"length": 6, "classes": ["up", "down"], "vocabulary": f"hf:{folder}/{name}/bert"}
    return LabelledText(str(folder / f"{name}.csv"), **kept)


def site(folder, name, **changes) -> SiteConfig:
    given = {"models": [f"hf:{folder}/{name}/bert"], "dataset": texts(folder, name)}
    return SiteConfig(name=name, insecure=True, patience=20.0, **given | changes)


# the noise of a test is no secret, so that it is the same again
PRIVATE = {"privacy": SampleLevel(noise_multiplier=0.5, batch_size=4, insecure_seed=1), "rounds": 2}


@pytest.mark.parametrize(
    "aggregation, options",
    [("ffa", {}), ("fedex", {}), ("ffa", PRIVATE)],
    ids=["ffa", "fedex", "ffa sample level"],
)
def test_only_adapters_travel_and_the_weights_are_those_of_one_process(
    folder, tmp_path, aggregation, options
):
    plan = offer(folder, lora=LoRA(rank=2, aggregation=aggregation), **options)
    with seeds.seeded(1):
        model, recipe = plan.build()
    plan = replace(plan, weights=model.digest)
    engine = Sites(plan=plan, address="127.0.0.1:0", deadline=60.0, minimum=2)
    server = Server(model, remotes(NAMES), recipe, engine=engine, seed=3)
    here = {"server": f"127.0.0.1:{server.session.port}"}
    made = [Site(site(folder, n, state=str(tmp_path / n), **here)) for n in NAMES]
    threads = [threading.Thread(target=s.run) for s in made]
    for t, s in zip(threads, made, strict=True):
        t.start()
        while s.plan is None and t.is_alive():
            time.sleep(0.01)
    told = [(figures, server.session.figures()) for figures in server.rounds(2)]
    server.close()
    for t, s in zip(threads, made, strict=True):
        t.join()
        s.close()
    with seeds.seeded(1):
        model, recipe = plan.build()
    data = [texts(folder, n).load(0).train for n in NAMES]
    clients = [Client(n, d) for n, d in zip(NAMES, data, strict=True)]
    alone = Server(model, clients, recipe, engine=Local(chunk=1), seed=3)
    [*alone.rounds(2)]
    worst = [
        (v - alone.model.state_dict()[k]).abs().max() for k, v in server.model.state_dict().items()
    ]
    assert max(worst) <= 1e-6 and server.moved()
    whole = sum(p.numel() * 4 for p in server.model.parameters())
    sent = [[f[f"site_{n}_bytes_sent"] for n in NAMES] for _, f in told]
    # north has the weights and is sent what was drawn; south is sent the weights, once
    assert sent[0][1] > whole and sent[0][0] < whole / 2
    if aggregation != "fedex":  # whose server moves the weights themselves
        assert max(sent[1]) < whole / 3 and max(sent[1]) <= sent[0][0]
        assert told[0][0]["bytes_down"] == told[1][0]["bytes_down"] < whole


@pytest.mark.parametrize(
    "named, place",
    [
        (["hf:FOLDER/north/bert"], "hf:FOLDER/north/bert"),
        (["hf:bert=FOLDER/north/bert"], "hf:FOLDER/north/bert"),
        (["mlp", "hf:bert=hf:FOLDER/south/bert"], "hf:FOLDER/south/bert"),
    ],
    ids=["folder", "name", "among others"],
)
def test_a_site_agrees_to_a_model_by_name_and_builds_it_from_its_own_files(folder, named, place):
    models = [n.replace("FOLDER", str(folder)) for n in named]
    table = plans.describe(offer(folder))
    assert str(folder) not in str(table) and table["model"] == "hf:bert"
    found = accept(table, site(folder, "north", models=models))
    assert found.place == place.replace("FOLDER", str(folder))
    assert plans.describe(found) == table


@pytest.mark.parametrize(
    "changes, models, why",
    [
        ({}, [], "does not train model 'hf:bert'.*--models hf:bert=FOLDER"),
        ({}, ["mlp"], "it trains mlp; where it has the files"),
        ({"model": "hf:../../etc"}, None, "does not train"),
        ({"model": "mlp"}, None, "does not train model 'mlp'"),
        ({"place": "hf:/etc"}, None, ""),
        ({"lora": {"name": "somebodys.LoRA"}}, None, "knows no lora"),
        ({"lora": {"name": "on", "rank": 10**9}}, None, "100,000,000 parameters"),
        ({"lora": None, "facts": {}}, None, "facts of tokens"),
    ],
    ids=["nothing", "another", "path", "no hf", "place", "code", "rank", "facts"],
)
def test_a_plan_for_a_model_that_a_site_has_not_agreed_to_is_refused(folder, changes, models, why):
    here = site(folder, "north", **({} if models is None else {"models": models}))
    table = plans.describe(offer(folder)) | changes
    if "place" in changes:  # what a server says of it is nothing to a site
        assert accept(table, here).place == here.models[0]
        return
    with pytest.raises(ConfigError, match=why):
        accept(table, here)


def test_other_weights_and_other_tokens_are_one_error_at_the_site(folder, tmp_path):
    plan = offer(folder)
    model, _ = plan.build()
    huggingface.same_weights(model, model.digest, plan.place)
    with pytest.raises(ConfigError, match=r"are not those of the run .* sends the weights once"):
        huggingface.same_weights(model, "0" * 64, plan.place)
    huggingface.same_weights(huggingface.build(plan.place, plan._facts, None), "0" * 64, plan.place)
    own = texts(folder, "north").load(0).facts
    huggingface.same_tokens(plan.facts, own, plan.model)
    with pytest.raises(ConfigError, match=r"give --dataset labelled-text .* hf:FOLDER"):
        huggingface.same_tokens(plan.facts, {"vocab_size": 12}, plan.model)
    with pytest.raises(ConfigError, match="give --dataset text"):
        huggingface.same_tokens(plan.facts | {"language": True}, own, plan.model)
    for other in ({"tokens": "0" * 64}, {"padding": 5}):
        with pytest.raises(ConfigError, match=r"tokenizer in .* is not that of the run"):
            huggingface.same_tokens(plan.facts | other, own, plan.model)


def test_a_server_says_what_a_model_of_texts_needs(folder):
    for changes, why in (
        ({"input_shape": [3, 4]}, "texts of one length"),
        ({"kind": "binary"}, "texts of one length"),
        ({"model": "mlp", "lora": None, "language": True}, "language is of models"),
    ):
        with pytest.raises(ConfigError, match=why):
            served(folder, **changes)
    assert offer(folder, language=True).facts["num_classes"] == len(tiny.WORDS)
    assert Path(offer(folder).place.removeprefix("hf:")).is_dir()
    assert torch.is_tensor(next(offer(folder).build()[0].parameters()))
