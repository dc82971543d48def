"""Weights that stay with their client, on every solver and engine that takes them."""

import copy

import pytest
import torch
from torch import nn

from conftest import watched
from fedtorch import Client, FedAvg, FedBN, FedPer, FedProx, Local, Recipe, Scaffold, Server
from fedtorch.engines import Processes
from fedtorch.privacy import ClientLevel, LocalDP, SampleLevel
from fedtorch.run import checkpoint, objects
from fedtorch.training.evaluate import evaluate, evaluate_clients
from fedtorch.training.losses import cross_entropy
from fedtorch.training.personal import personal, shared
from fedtorch.types import ConfigError

HEAD = ("head.*",)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.body(x))


def clients(sizes=(8, 12, 8)):
    g = torch.Generator().manual_seed(0)

    def make(n):
        return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

    return [Client(f"c{k}", make(n), make(6)) for k, n in enumerate(sizes)]


def trained(strategy, rounds=2, **options):
    """A server after some rounds, its shared weights and each client's own in one flat table."""
    engine = options.pop("engine", Local(solver="general"))
    model = options.pop("model", None) or Net()
    recipe = Recipe(strategy, lr=0.1, batch_size=4, **options)
    server = Server(model, clients(), recipe, engine=engine, seed=3)
    figures = [*server.rounds(rounds)]
    own = {f"{i}/{k}": v for i, m in server.own().items() for k, v in m.items()}
    server.close()
    return server, own | server._weights.copied(), figures


def worst(a, b):
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


@pytest.mark.parametrize("strategy", [FedPer(), FedBN(), FedProx(mu=0.5, personal=HEAD)], ids=str)
def test_stacked_clients_are_as_each_alone(strategy):
    _, one, _ = trained(strategy)
    _, many, _ = trained(strategy, engine=Local(solver="stacked", chunk=2))
    assert worst(one, many) < 1e-6


def test_worker_processes_hand_a_clients_own_weights_from_visit_to_visit():
    strategy = Scaffold(personal=HEAD)
    _, here, _ = trained(strategy, rounds=3)
    _, there, _ = trained(strategy, rounds=3, engine=Processes(workers=1, solver="general"))
    assert worst(here, there) == 0


def test_personal_parts_do_not_travel_and_differ_between_clients():
    start = Net().state_dict()
    server, all_, figures = trained(FedPer())
    body = 4 * (30 + 5 + 20)
    assert all(f["bytes_down"] == f["bytes_up"] == 3 * body for f in figures)
    # those that a client starts from
    assert torch.equal(server.model.head.weight, start["head.weight"])
    assert not torch.equal(all_["c0/head.weight"], all_["c1/head.weight"])
    mine = server.model_of("c1")
    assert torch.equal(mine.head.weight, all_["c1/head.weight"])
    assert torch.equal(mine.body[0].weight, server.model.body[0].weight)
    server, all_, figures = trained(FedBN())
    assert figures[0]["bytes_up"] == 3 * 4 * (30 + 5 + 15 + 3)
    names = {"body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var"}
    assert server.own()["c0"].keys() == names
    assert torch.equal(server.model.body[1].running_mean, torch.zeros(5))
    assert not torch.equal(all_["c0/body.1.running_mean"], all_["c1/body.1.running_mean"])


def test_each_client_is_judged_with_what_it_keeps():
    server, _, _ = trained(FedPer())
    before = copy.deepcopy(server.model.state_dict())
    metrics = {"loss": cross_entropy}
    found = evaluate_clients(server.model, clients(), metrics, server.own())
    for client in clients():
        assert found[client.id] == evaluate(server.model_of(client.id), client.validation, metrics)
    assert all(torch.equal(before[k], v) for k, v in server.model.state_dict().items())
    with pytest.raises(ConfigError, match="no client 'nobody'"):
        server.model_of("nobody")


def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    strategy = Scaffold(personal=("head.*", "@BatchNorm"))
    _, whole, _ = trained(strategy, rounds=4)
    half, _, _ = trained(strategy)
    path = checkpoint.save(tmp_path, half.state_dict())
    assert path.stat().st_mode & 0o077 == 0
    recipe = Recipe(strategy, lr=0.1, batch_size=4)
    again = Server(Net(), clients(), recipe, engine=Local(solver="general"))
    again.load_state_dict(checkpoint.load(tmp_path))
    [*again.rounds(2)]
    own = {f"{i}/{k}": v for i, m in again.own().items() for k, v in m.items()}
    assert worst(whole, own | again._weights.copied()) == 0


@pytest.mark.parametrize(
    "plan",
    [
        SampleLevel(noise_multiplier=1.0, rounds=2, steps=2, insecure_seed=5),
        ClientLevel(noise_multiplier=1.0, rounds=2, insecure_seed=5),
        LocalDP(epsilon=8.0, rounds=2, insecure_seed=5),
    ],
    ids=lambda p: type(p).__name__,
)
def test_under_a_plan_only_the_shared_part_is_released(plan):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    server = Server(model, clients(), Recipe(FedAvg(personal=("2.*",)), privacy=plan))
    sent = watched(server)
    [*server.rounds(2)]
    assert all(u.sent["delta"].keys() == {"0.weight", "0.bias"} for u in sent)
    assert server.own() and all(m.keys() == {"2.weight", "2.bias"} for m in server.own().values())


def test_a_client_whose_own_part_is_not_finite_is_left_out_and_keeps_what_it_had():
    class Spoiled(Net):
        def forward(self, x):
            out = super().forward(x)
            return out + (self.head.bias * 1e30 * 1e30 if len(x) == 4 and x.sum() > 1e6 else 0.0)

    server = Server(Spoiled(), clients(), Recipe(FedPer(), lr=0.1, batch_size=4))
    [*server.rounds(1)]
    before = copy.deepcopy(server.own())
    client = server.session.clients["c0"]
    client.data.tensors[0].fill_(1e7)
    figures = server.round()
    assert figures["failed"] == {"c0": "nonfinite"}
    assert all(torch.equal(before["c0"][k], v) for k, v in server.own()["c0"].items())
    assert not torch.equal(before["c1"]["head.weight"], server.own()["c1"]["head.weight"])


def test_what_is_personal_goes_by_name_or_by_kind_of_layer():
    net = Net()
    norm = {"body.1.weight", "body.1.bias", "body.1.running_mean", "body.1.running_var"}
    assert personal(net, ("@BatchNorm",)) == norm
    assert personal(net, HEAD) == {"head.weight", "head.bias"}
    assert shared(net, ("@Linear",)) == ["body.1.weight", "body.1.bias"]
    for patterns, why in [
        (("tail.*",), r"fits nothing .* 'body\.0\.\*' \(first layer\) or 'head\.\*' \(last\)"),
        (("*",), "nothing would be averaged"),
        ("head.*", "is one name"),
    ]:
        with pytest.raises(ConfigError, match=why):
            personal(net, patterns)
    with pytest.raises(ConfigError, match=r"@BatchNorm.*its layers are Linear; .*fedavg"):
        Server(nn.Linear(6, 3), clients(), Recipe(FedBN()))


def test_the_fast_path_says_why_it_is_not_taken():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    server = Server(model, clients(), Recipe(FedAvg(personal=("2.*",))))
    assert any("weights stay with the clients" in n for n in server.notes)
    assert any("server.model_of" in n for n in server.notes)


def test_names_come_from_the_command_line_and_go_into_a_config():
    made = objects.choose("strategy", {"name": "fedper", "personal": "2.*,@BatchNorm"})
    assert made == FedPer(personal=("2.*", "@BatchNorm"))
    assert objects.choose("strategy", objects._entry(made)) == made
