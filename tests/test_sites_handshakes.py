"""A line that will never open ends at once, with cause and file; one that was open goes on trying."""

import shutil
from contextlib import closing, contextmanager

import numpy as np
import pytest

from fedtorch.data import Npz
from fedtorch.sites import keys
from fedtorch.sites.options import SiteConfig
from fedtorch.sites.rpc import Listener, NeverOpens, ServerLine, Unreachable, read_keys
from fedtorch.sites.site import Site
from fedtorch.types import ConfigError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, host in (("ours", "127.0.0.1"), ("others", "127.0.0.1"), ("far", "fed.example.org")):
        keys.make(folder / name, [host], ["north", "south"], 2)
    # signed by others, and takes our server for what it is
    shutil.copytree(folder / "others/north", folder / "mixed")
    shutil.copy(folder / "ours/north/ca.pem", folder / "mixed/ca.pem")
    return folder


@contextmanager
def called(server, site, address="127.0.0.1:0"):
    """A server by some keys, and a site's line to it by others."""
    listener = Listener(address, server, 2, 1 << 20, lambda *call: b"heard", ["north", "south"])
    line = ServerLine(f"127.0.0.1:{listener.port}", site, "north", 1 << 20)
    try:
        yield line
    finally:
        line.close()
        listener.server.stop(0).wait()


@pytest.mark.parametrize(
    ("server", "site", "why"),
    [
        ("ours/server", "others/north", "others/north/ca.pem has not signed"),
        ("ours/server", "mixed", "does not take the certificate .*mixed/cert.pem"),
        ("far/server", "far/north", "not for 127.0.0.1: give --server"),
        ("ours/server", None, "speaks TLS alone: give --credentials"),
        (None, "ours/north", "speaks no TLS"),
    ],
)
def test_keys_that_do_not_fit_end_the_first_call_by_a_sentence(folder, server, site, why):
    with (
        called(server and folder / server, site and folder / site) as line,
        pytest.raises(NeverOpens, match=why),
    ):
        line.call("join", b"x", 20)


def test_a_line_that_was_open_is_tried_again_whoever_answers_there_now(folder):
    with called(folder / "ours/server", folder / "ours/north") as line:
        assert line.call("join", b"x", 20) == b"heard"
        address = line.address
        line.answered = True
    again = ServerLine(address, folder / "ours/north", "north", 1 << 20)
    again.answered = True
    other = Listener(address, folder / "others/server", 2, 1 << 20, lambda *call: b"lie", ["north"])
    with pytest.raises(Unreachable, match=r"ours/north/ca.pem has not signed") as e:
        again.call("join", b"x", 20)
    assert not isinstance(e.value, NeverOpens)
    again.close()
    other.server.stop(0).wait()


def test_a_server_that_is_away_is_no_fault_of_the_keys(folder):
    with called(folder / "ours/server", folder / "ours/north") as line:
        address = line.address
    for own in (folder / "ours/north", None):
        late = ServerLine(address, own, "north", 1 << 20)
        with pytest.raises(Unreachable, match="refused"):
            late.call("join", b"x", 20)
        late.close()


@pytest.mark.parametrize("name", ["key.pem", "cert.pem", "ca.pem"])
@pytest.mark.parametrize("left", [0, 60])
def test_a_file_that_is_cut_short_is_refused_before_it_can_end_the_process(
    folder, tmp_path, name, left
):
    own = shutil.copytree(folder / "ours/north", tmp_path / "own")
    (own / name).write_bytes((own / name).read_bytes()[:left])
    with pytest.raises(ConfigError, match=rf"{name}.* cannot be used"):
        read_keys(own)


def test_a_key_under_a_password_is_refused_and_not_asked_for(folder, tmp_path):
    from cryptography.hazmat.primitives import serialization as s

    own = shutil.copytree(folder / "ours/north", tmp_path / "own")
    key = s.load_pem_private_key((own / "key.pem").read_bytes(), None)
    locked = s.BestAvailableEncryption(b"secret")
    form = s.Encoding.PEM, s.PrivateFormat.PKCS8, locked
    (own / "key.pem").write_bytes(key.private_bytes(*form))
    with pytest.raises(ConfigError, match="no password"):
        read_keys(own)


def test_a_server_is_refused_a_sites_certificate(folder):
    with pytest.raises(
        ConfigError, match=r"cert.pem is a site's certificate, and this is the server"
    ):
        read_keys(folder / "ours/north", serves=True)


def site(folder, tmp_path, credentials, port=1):
    np.savez(tmp_path / "d.npz", x=np.ones((6, 2), np.float32), y=np.arange(6) % 2)
    return SiteConfig(
        name="north",
        server=f"127.0.0.1:{port}",
        credentials=str(folder / credentials),
        dataset=Npz(str(tmp_path / "d.npz")),
        state=str(tmp_path / "state"),
    )


def test_a_site_by_another_name_than_its_certificates_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"certificate of south, .* not for north"):
        Site(site(folder, tmp_path, "ours/south"))


def test_a_site_with_keys_of_another_authority_ends_at_once(folder, tmp_path):
    with called(folder / "ours/server", folder / "ours/north") as line:
        port = int(line.address.rpartition(":")[2])
        with (
            closing(Site(site(folder, tmp_path, "others/north", port))) as here,
            pytest.raises(ConfigError, match=r"others/north/ca.pem has not signed"),
        ):
            here.run()
