"""An authority and certificates of it, made by the openssl command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from common.config import TlsConfig


def _openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


class Authority:
    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self.cert, self._key = folder / "ca.pem", folder / "ca.key"
        _openssl(
            *("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", self._key, "-out", self.cert),
        )

    def issue(self, name: str) -> tuple[Path, Path]:
        """Certificate and key for this machine; again for the same name: renewed in place."""
        cert, key, request = (self._folder / f"{name}.{kind}" for kind in ("pem", "key", "csr"))
        extensions = self._folder / f"{name}.ext"
        extensions.write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
        made_key, made_cert = key.with_suffix(".new-key"), cert.with_suffix(".new-cert")
        _openssl(
            *("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={name}", "-keyout", made_key, "-out", request),
        )
        _openssl(
            *("x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self._key, "-CAcreateserial"),
            *("-days", "2", "-extfile", extensions, "-out", made_cert),
        )
        made_key.replace(key)
        made_cert.replace(cert)
        return cert, key

    def config(self, name: str) -> TlsConfig:
        cert, key = self.issue(name)
        return TlsConfig(ca=str(self.cert), cert=str(cert), key=str(key))
