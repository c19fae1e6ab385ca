"""Certificates made on the spot, with the `openssl` command."""

import subprocess
from pathlib import Path
from typing import NamedTuple

EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Certificate(NamedTuple):
    """Files in PEM format."""

    cert: Path
    key: Path


class Authority:
    """A certificate authority that no client trusts unless it is named to it: `ca` is its certificate."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca = directory / "ca.pem"
        extensions = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
        _openssl(
            directory, *EC_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test CA", *extensions
        )

    def sign(self, name: str, addresses: str = "DNS:localhost,IP:127.0.0.1") -> Certificate:
        """Return a server's certificate for these addresses, which this authority has signed."""
        made = Certificate(self.directory / f"{name}.pem", self.directory / f"{name}.key")
        subject = ("-subj", f"/CN={name}", "-addext", f"subjectAltName={addresses}")
        extensions = ("-addext", "basicConstraints=critical,CA:FALSE", "-addext", "keyUsage=digitalSignature")
        issuer = ("-CA", "ca.pem", "-CAkey", "ca.key")
        _openssl(
            self.directory,
            *EC_KEY,
            "-keyout",
            made.key.name,
            "-out",
            made.cert.name,
            *subject,
            *extensions,
            *issuer,
        )
        return made


def self_signed(directory: Path, *options: str) -> Certificate:
    """Return a certificate that is its own authority."""
    made = Certificate(directory / "cert.pem", directory / "key.pem")
    _openssl(directory, *EC_KEY, "-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=redis", *options)
    return made


def _openssl(directory: Path, *arguments: str) -> None:
    command = ("openssl", "req", "-x509", "-days", "2", *arguments)
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
