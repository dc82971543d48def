"""Certificates and keys for a trial: an authority, the server, and one pair for each site.

The authority's key signs new sites and is needed nowhere else: keep it off the server. An organisation
with an authority of its own does not need any of this; only the names matter (``common_name``).
"""

import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtorch import disk
from fedtorch.engines.wire import printable
from fedtorch.types import ConfigError

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""What a site may be called: the common name of its certificate."""
Key = ec.EllipticCurvePrivateKey
SIGNED = ec.ECDSA(hashes.SHA256())


def make(folder: Path, hosts: Sequence[str], sites: Sequence[str], days: int) -> list[Path]:
    """Write ``folder/ca``, ``folder/server`` and ``folder/SITE``; returns the folders that are new.

    An authority that is there is used again, so that sites can be added later; a pair that is there is
    kept. Raises ConfigError for names that no certificate can carry.
    """
    for name in sites:
        if not SITE_NAME.fullmatch(name) or name in ("ca", "server"):
            raise ConfigError(f"{name!r} cannot be a site's name: letters, digits, . _ - only")
    if not (hosts or sites) and (folder / "server").exists():
        return []
    if not hosts and not (folder / "server").exists():
        raise ConfigError("--server HOST[,HOST]: name the addresses sites will reach the server by")
    key, authority = _authority(folder / "ca", days)
    made = []
    alternatives = x509.SubjectAlternativeName([_host(h) for h in hosts])
    for name in [*(["server"] if hosts else []), *sites]:
        if (folder / name).exists():
            continue
        server = name == "server"
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        own = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(name, authority.subject, own, days)
            .add_extension(_issuer(authority), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(alternatives if server else _uri(name), critical=False)
        )
        _write(folder / name, own, builder.sign(key, hashes.SHA256()), authority)
        made.append(folder / name)
    return made


@lru_cache(maxsize=1024)
def common_name(pem: bytes) -> str:
    """The one common name of a certificate, if it can be a site's name; "" for any other."""
    try:
        subject = x509.load_pem_x509_certificate(pem).subject
        names = [str(n.value) for n in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except ValueError:  # what the other side's TLS took for a certificate, and this parser does not
        return ""
    return names[0] if len(names) == 1 and SITE_NAME.fullmatch(names[0]) else ""


def fingerprint(pem: bytes) -> str:
    """SHA-256 of a certificate, in hex; raises ConfigError for what is none."""
    return read(pem).fingerprint(hashes.SHA256()).hex()


def bare_fingerprint(fingerprint: str) -> str:
    """A fingerprint with colons or capitals, as others write it, in our way; "" for what is none."""
    bare = fingerprint.replace(":", "").lower()
    return bare if re.fullmatch(r"[0-9a-f]{64}", bare) else ""


def fingerprints(folder: Path) -> dict[str, str]:
    """Of the sites whose certificates lie in ``folder``, by name."""
    found = {p.parent.name: p for p in sorted(folder.glob("*/cert.pem"))}
    return {
        n: fingerprint(disk.regular(p).read_bytes())
        for n, p in found.items()
        if n not in ("ca", "server")
    }


def verified(pem: bytes, name: str, authority: bytes) -> x509.Certificate:
    """The certificate of site ``name``, as a strict verifier takes it: dates, issuer, purpose and path.

    ``authority``: ca.pem, with what lies between it and the sites where there is such. Raises ConfigError.
    """
    certificate = read(pem)
    if common_name(pem) != name:
        raise ConfigError(f"the certificate of {name!r} is of somebody else")
    known = x509.load_pem_x509_certificates(authority)
    builder = verification.PolicyBuilder().store(verification.Store(known))
    try:
        builder.build_client_verifier().verify(certificate, known)
    except verification.VerificationError as e:
        raise ConfigError(
            f"the certificate of {name!r} does not hold for secure aggregation ({printable(str(e), 120)}): "
            "make the federation's keys anew with this version's fedtorch keys, in an empty folder"
        ) from e
    return certificate


def signer(folder: Path) -> Callable[[bytes], bytes]:
    """Signs by the key in a site's folder; raises ConfigError where it is of another kind."""
    key = serialization.load_pem_private_key((folder / "key.pem").read_bytes(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"{folder / 'key.pem'} is no key of an elliptic curve: secure aggregation signs by ECDSA with "
            "SHA-256; fedtorch keys makes such keys"
        )
    return lambda text: key.sign(text, SIGNED)


def signed(certificate: x509.Certificate, text: bytes, signature: bytes) -> bool:
    """Whether the key of this certificate has signed the text."""
    public = certificate.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        return False
    try:
        public.verify(signature, text, SIGNED)
    except InvalidSignature:
        return False
    return True


def read(pem: bytes) -> x509.Certificate:
    """A certificate; raises ConfigError for what is none."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError as e:
        raise ConfigError("this is no certificate (PEM)") from e


def check_pair(folder: Path, key: bytes, own: bytes, serves: bool) -> None:
    """Raises ConfigError where no line would open: another certificate's key, or one out of date.

    ``serves``: this is the server, whose certificate must not be a site's.
    """
    try:
        certificate = x509.load_pem_x509_certificate(own)
        secret = serialization.load_pem_private_key(key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TLS may take it all the same, and says
        return
    if secret.public_key() != certificate.public_key():
        raise ConfigError(
            f"{folder}: key.pem is not the key of cert.pem: copy both from one folder"
        )
    if serves and not _may_serve(certificate):
        raise ConfigError(
            f"{folder / 'cert.pem'} is a site's certificate, and this is the server: take the folder "
            "server of those that fedtorch keys made"
        )
    begins, ends, now = (
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        datetime.now(UTC),
    )
    if not begins <= now <= ends:
        raise ConfigError(
            f"{folder / 'cert.pem'} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, and this machine's "
            f"clock says {now:%Y-%m-%d}: have another one made (fedtorch keys), or set the clock"
        )


def _may_serve(certificate: x509.Certificate) -> bool:
    """Whether it is for a server; one that names no uses is for any."""
    try:
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        return True
    known = ExtendedKeyUsageOID
    return known.SERVER_AUTH in uses or known.ANY_EXTENDED_KEY_USAGE in uses


def check_named(folder: Path, name: str) -> None:
    """Raises ConfigError where the certificate in ``folder``, which decides, is not of ``name``."""
    path = folder / "cert.pem"
    shown = common_name(disk.regular(path).read_bytes())
    if shown != name:
        raise ConfigError(
            f"{path} is the certificate of {shown or 'nobody who could be a site'}, and the server would "
            f"take this site for that one, not for {name}: give --name or --credentials that go together"
        )


def _authority(folder: Path, days: int) -> tuple[Key, x509.Certificate]:
    if folder.exists():
        try:
            own, shown = (disk.regular(folder / n).read_bytes() for n in ("key.pem", "cert.pem"))
            key = serialization.load_pem_private_key(own, None)
            certificate = x509.load_pem_x509_certificate(shown)
        except (OSError, ValueError) as e:
            raise ConfigError(f"the authority in {folder} cannot be read: {e}") from e
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ConfigError(f"the authority in {folder} was not made by fedtorch keys")
        return key, certificate
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedtorch trial authority")])
    certificate = (
        _builder("fedtorch trial authority", name, key, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder, key, certificate, certificate)
    return key, certificate


def _builder(name: str, issuer: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks of two machines differ
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _issuer(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    try:
        known = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # of an authority that an older version made
        public = authority.public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)  # _authority has looked
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(known)


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _uri(name: str) -> x509.SubjectAlternativeName:
    """A site's name where strict verifiers look for one; it is no host, so it must not be a DNS name."""
    return x509.SubjectAlternativeName(
        [x509.UniformResourceIdentifier(f"urn:fedtorch:site:{name}")]
    )


def _write(folder: Path, key: Key, own: x509.Certificate, authority: x509.Certificate) -> None:
    try:
        folder.mkdir(parents=True)
        secret = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        # made readable for its owner alone before anything is in it
        with os.fdopen(os.open(folder / "key.pem", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(secret)
        pem = serialization.Encoding.PEM
        (folder / "cert.pem").write_bytes(own.public_bytes(pem))
        (folder / "ca.pem").write_bytes(authority.public_bytes(pem))
    except OSError as e:
        raise ConfigError(f"keys cannot be written to {folder}: {e.strerror}") from e


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
