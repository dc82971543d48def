"""Keys of a trial: what the certificates say, and who may read the secrets."""

import tomllib
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from fedtorch import ConfigError
from fedtorch import __main__ as program
from fedtorch.sites import keys
from fedtorch.sites.rpc import ServerLine


def test_keys_are_private_and_sites_can_be_added(tmp_path):
    keys.make(tmp_path, ["localhost"], ["a"], 2)
    assert (tmp_path / "a/key.pem").stat().st_mode & 0o077 == 0
    assert keys.make(tmp_path, [], ["a", "b"], 2) == [tmp_path / "b"]
    for bad in ("../x", "a b", "ca", ""):
        with pytest.raises(ConfigError, match="cannot be a site's name"):
            keys.make(tmp_path, [], [bad], 2)
    (tmp_path / "a/key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ServerLine("localhost:1", tmp_path / "a", "a", 1)
    with pytest.raises(ConfigError, match=r"key.pem, cert.pem and ca.pem"):
        ServerLine("localhost:1", tmp_path / "none", "a", 1)


def test_a_pair_that_no_line_would_take_is_refused_before_the_first_call(tmp_path):
    keys.make(tmp_path, ["localhost"], ["a", "b"], 2)
    keys.make(tmp_path / "old", ["localhost"], ["a"], 0)
    with pytest.raises(ConfigError, match=r"cert\.pem is valid from .* this machine's clock"):
        ServerLine("localhost:1", tmp_path / "old/a", "a", 1)
    (tmp_path / "a/key.pem").write_bytes((tmp_path / "b/key.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"a: key\.pem is not the key of cert\.pem"):
        ServerLine("localhost:1", tmp_path / "a", "a", 1)


def test_a_certificate_is_good_for_one_thing_only(tmp_path):
    keys.make(tmp_path, ["fed.example", "10.0.0.7"], ["north"], 30)
    found = {
        name: x509.load_pem_x509_certificate((tmp_path / name / "cert.pem").read_bytes())
        for name in ("ca", "server", "north")
    }
    now = datetime.now(UTC)
    for name, certificate in found.items():
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        # the authority signs no other authorities; that no site is one must be heeded by all who read it
        assert basic.critical and basic.value.ca == (name == "ca")
        assert basic.value.path_length == (0 if name == "ca" else None)
        certificate.verify_directly_issued_by(found["ca"])
        # clocks of two machines may differ by some minutes
        assert timedelta(minutes=4) < now - certificate.not_valid_before_utc < timedelta(minutes=9)
        assert abs(certificate.not_valid_after_utc - now - timedelta(days=30)) < timedelta(
            minutes=5
        )
    for name, purpose in (("server", Usage.SERVER_AUTH), ("north", Usage.CLIENT_AUTH)):
        usage = found[name].extensions.get_extension_for_class(x509.ExtendedKeyUsage)
        assert [*usage.value] == [purpose]
    names = found["server"].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("10.0.0.7")]
    names = found["north"].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [n.value for n in names] == ["urn:fedtorch:site:north"]  # no host: it is no server


def test_a_strict_verifier_takes_them_and_only_for_what_they_are(tmp_path):
    keys.make(tmp_path / "a", ["fed.example"], ["north", "St_Mary.1"], 30)
    keys.make(tmp_path / "b", ["fed.example"], ["north"], 30)
    own, other = ((tmp_path / k / "ca/cert.pem").read_bytes() for k in "ab")
    pems = {n: (tmp_path / "a" / n / "cert.pem").read_bytes() for n in ("north", "server", "ca")}
    assert keys.verified(pems["north"], "north", own)
    assert keys.verified((tmp_path / "a/St_Mary.1/cert.pem").read_bytes(), "St_Mary.1", own)
    known = verification.Store(x509.load_pem_x509_certificates(own))
    server = verification.PolicyBuilder().store(known)
    server.build_server_verifier(x509.DNSName("fed.example")).verify(
        x509.load_pem_x509_certificate(pems["server"]), []
    )
    for pem, name, authority, why in (
        (pems["north"], "south", own, "somebody else"),
        (pems["north"], "north", other, "fedtorch keys, in an empty folder"),
        (pems["server"], "server", own, "does not hold"),
        (pems["ca"], "north", own, "somebody else"),
        (b"-----BEGIN", "north", own, "no certificate"),
    ):
        with pytest.raises(ConfigError, match=why):
            keys.verified(pem, name, authority)


def test_a_certificate_without_the_identifiers_of_its_issuer_is_refused_with_the_fix(tmp_path):
    keys.make(tmp_path, ["localhost"], ["north"], 2)
    key, authority = keys._authority(tmp_path / "ca", 2)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "north")])
    now = datetime.now(UTC)
    bare = x509.CertificateBuilder(authority.subject, name, key.public_key(), 7)
    bare = bare.not_valid_before(now - timedelta(1)).not_valid_after(now + timedelta(1))
    pem = bare.sign(key, SHA256()).public_bytes(Encoding.PEM)
    assert keys.common_name(pem) == "north"  # a plain run takes it as before
    with pytest.raises(ConfigError, match="fedtorch keys"):
        keys.verified(pem, "north", (tmp_path / "ca/cert.pem").read_bytes())


def test_fingerprints_are_printed_as_a_table_for_those_who_pin_their_peers(tmp_path, capsys):
    words = ["keys", str(tmp_path), "--server", "localhost", "--sites", "north,st.mary"]
    assert program.main(words) == 0
    told = tomllib.loads(capsys.readouterr().out.partition("\n\n")[2])["peers"]
    assert told == keys.fingerprints(tmp_path) and {*told} == {"north", "st.mary"}
    der = x509.load_pem_x509_certificate((tmp_path / "north/cert.pem").read_bytes())
    assert told["north"] == sha256(der.public_bytes(Encoding.DER)).hexdigest()
    assert program.main(["keys", str(tmp_path)]) == 0  # once more, when nothing is to be made
    assert told["st.mary"] in capsys.readouterr().out
    as_openssl = ":".join(told["north"][k : k + 2] for k in range(0, 64, 2)).upper()
    assert keys.bare_fingerprint(as_openssl) == told["north"]
    assert not keys.bare_fingerprint(told["north"][:-1]) and not keys.bare_fingerprint("sha256")
