"""Keys of a trial: what the certificates say, and who may read the secrets."""

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID as Usage

from fedtorch import ConfigError
from fedtorch.sites import keys
from fedtorch.sites.rpc import Line


def test_keys_are_private_and_sites_can_be_added(tmp_path):
    keys.make(tmp_path, ["localhost"], ["a"], 2)
    assert (tmp_path / "a/key.pem").stat().st_mode & 0o077 == 0
    assert keys.make(tmp_path, [], ["a", "b"], 2) == [tmp_path / "b"]
    for bad in ("../x", "a b", "ca", ""):
        with pytest.raises(ConfigError, match="cannot be a site's name"):
            keys.make(tmp_path, [], [bad], 2)
    (tmp_path / "a/key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Line("localhost:1", tmp_path / "a", "a", 1)
    with pytest.raises(ConfigError, match=r"key.pem, cert.pem and ca.pem"):
        Line("localhost:1", tmp_path / "none", "a", 1)


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
    with pytest.raises(x509.ExtensionNotFound):
        found["north"].extensions.get_extension_for_class(x509.SubjectAlternativeName)
