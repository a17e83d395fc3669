"""Content credentials: what made a file, signed into it by C2PA (https://c2pa.org).

``sign`` writes a manifest into an MP4 or a PNG: that a trained model made it, by which software,
from which prompt and settings. ``verify`` tells whether the picture data are still the signed ones:

    python -m model.provenance verify out.mp4

Everything happens offline, with a key of your own that is made when it is first needed. Such a key
proves **integrity** (this is what was signed, unchanged) and not **origin**: anybody can make a key
of their own and sign anything with it, and a manifest can be removed. For origin, use a certificate
that a verifier's trust list knows: put its chain and key in the key folder.
"""

from __future__ import annotations

import datetime
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.cli import Parser, run
from model.files import CheckpointError, write_beside

GENERATOR = {"name": "sora_kernels", "version": "0.1.0"}
TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
ABOUT = "org.sora_kernels.generation"
FORMATS = {".mp4": "video/mp4", ".png": "image/png"}
CHAIN, KEY = "chain.pem", "key.pem"
YEARS = 10
UNTRUSTED = "signingCredential.untrusted"  # said by `Verdict.trusted`, no fault of the file


class ProvenanceError(ValueError):
    """A file that cannot be signed or read, or keys that do not work."""


@dataclass(frozen=True)
class Verdict:
    """What a file's manifest says.

    Attributes:
        state: "valid" (unchanged since it was signed), "invalid" (changed, or a broken manifest)
            or "unsigned" (no manifest).
        trusted: whether the signer is on a trust list; never with a key of your own.
        reasons: codes of what failed.
        about: what was signed: prompt, seed and so on.
    """

    state: str
    trusted: bool = False
    reasons: tuple[str, ...] = ()
    about: Mapping[str, Any] | None = None


def default_keys() -> Path:
    """The key folder: SORA_KERNELS_KEYS, else a folder of the user."""
    named = os.environ.get("SORA_KERNELS_KEYS")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(named) if named else Path(data) / "sora_kernels" / "keys"


def make_keys(folder: Path) -> None:
    """Writes a new signing key and its certificate chain (leaf, then its own authority).

    ES256 (ECDSA on P-256). The authority's key is thrown away once it has signed the leaf. C2PA
    wants an end-entity certificate with a named purpose, so a self-signed one is not enough.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    until = now + datetime.timedelta(days=365 * YEARS)

    def name(common: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "sora_kernels, own key"),
                x509.NameAttribute(NameOID.COMMON_NAME, common),
            ]
        )

    def usage(*, signs: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs, key_cert_sign=signs, crl_sign=signs,
            content_commitment=False, key_encipherment=False, data_encipherment=False,
            key_agreement=False, encipher_only=False, decipher_only=False,
        )  # fmt: skip

    authority_key, leaf_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_id = x509.SubjectKeyIdentifier.from_public_key(authority_key.public_key())

    def certificate(common: str, key: Any) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name(common))
            .issuer_name(name("authority"))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(until)
        )

    authority = (
        certificate("authority", authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs=True), critical=True)
        .add_extension(authority_id, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    leaf = (
        certificate("content", leaf_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        )
        .add_extension(
            x509.SubjectKeyIdentifier.from_public_key(leaf_key.public_key()), critical=False
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )
    chain = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (leaf, authority))
    secret = leaf_key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )

    def write_secret(path: Path) -> None:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secret)

    write_beside(folder / KEY, write_secret)
    write_beside(folder / CHAIN, lambda path: _write(path, chain))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


class _Target(io.FileIO):
    """A file to write to that remembers why the system refused: c2pa only tells that it did."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+b")
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.refused = error
            raise
        return len(data)


def _library() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise ProvenanceError(
            "c2pa: expected the package c2pa-python to sign and verify files, found none"
        ) from error
    return c2pa


def _format(path: Path) -> str:
    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        raise ProvenanceError(
            f"path: expected a name that ends in {' or '.join(FORMATS)}, got {path.name}"
        ) from None


def sign(path: Path, about: Mapping[str, Any], keys: Path | None = None) -> None:
    """Puts a signed manifest into the MP4 or PNG in `path`, whole or not at all.

    Args:
        path: the file; it is replaced by its signed copy.
        about: JSON values that are signed with it, such as the prompt and the seed.
        keys: folder of the key and the chain; made when it holds none.

    Raises ProvenanceError.
    """
    c2pa = _library()
    form = _format(path)
    if not path.is_file():
        raise ProvenanceError(f"{path}: no such file")
    keys = default_keys() if keys is None else keys
    if not (keys / KEY).exists() and not (keys / CHAIN).exists():
        try:
            make_keys(keys)
        except CheckpointError as error:
            raise ProvenanceError(f"{path}: cannot be signed: {error}") from error
    manifest = {
        "claim_generator_info": [GENERATOR],
        "format": form,
        "title": path.name,
        "assertions": [
            {
                "label": "c2pa.actions.v2",
                "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": TRAINED}]},
            },
            {"label": ABOUT, "data": dict(about)},
        ],
    }

    def write(beside: Path) -> None:
        with (
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(manifest) as builder,
            open(path, "rb") as source,
            _Target(beside) as target,
        ):
            try:
                builder.sign(signer, form, source, target)
            except c2pa.C2paError as error:
                raise (target.refused or error) from error

    try:
        info = c2pa.C2paSignerInfo(
            alg=c2pa.C2paSigningAlg.ES256,
            sign_cert=(keys / CHAIN).read_bytes(),
            private_key=(keys / KEY).read_bytes(),
            ta_url=None,
        )
        write_beside(path, write)
    except (c2pa.C2paError, OSError) as error:
        reason = f"cannot be signed with the key in {keys}: {error}"
        raise ProvenanceError(f"{path}: {reason}") from error


def verify(path: Path) -> Verdict:
    """Reads the manifest in `path` and compares it with the file. Raises ProvenanceError for a
    file that is missing or is neither MP4 nor PNG."""
    c2pa = _library()
    form = _format(path)
    if not path.is_file():
        raise ProvenanceError(f"{path}: no such file")
    try:
        with open(path, "rb") as file:
            reader = c2pa.Reader.try_create(form, file)
            if reader is None:
                return Verdict("unsigned")
            with reader:
                state = reader.get_validation_state() or "Invalid"
                results = reader.get_validation_results() or {}
                manifest = reader.get_active_manifest() or {}
    except c2pa.C2paError as error:
        return Verdict("invalid", reasons=(str(error),))
    failed = [entry["code"] for entry in results.get("activeManifest", {}).get("failure", [])]
    about = [a["data"] for a in manifest.get("assertions", ()) if a["label"] == ABOUT]
    return Verdict(
        "invalid" if state == "Invalid" else "valid",
        trusted=state == "Trusted",
        reasons=tuple(code for code in dict.fromkeys(failed) if code != UNTRUSTED),
        about=about[0] if about else None,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m model.provenance", description="Content credentials (C2PA).")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    check = commands.add_parser("verify", help="tell whether a file is as it was signed")
    check.add_argument("file", type=Path, help="a .mp4 or .png")
    args = parser.parse_args(argv)
    verdict = verify(args.file)
    print(f"{args.file}: {verdict.state}" + "".join(f" ({code})" for code in verdict.reasons))
    if verdict.about is not None:
        for name, value in verdict.about.items():
            print(f"  {name}: {value}")
    if verdict.state != "valid":
        sys.exit(1)


if __name__ == "__main__":
    run("python -m model.provenance", main)
