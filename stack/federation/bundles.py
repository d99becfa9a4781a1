"""Signed app bundles: how a coordinator hands its SuperLink one that SuperNodes can check.

A SuperNode with ``--trusted-entities`` runs a bundle only if one of those keys has signed it. Flower 1.41 takes
signatures from its hub alone, whose address is a setting (``FLWR_SUPERGRID_API_URL``); this is a hub for one bundle,
on the coordinator's loopback. The signing key stays with whoever releases the bundle.
"""

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from services.contracts.errors import ConfigError
from stack.federation.credentials import SIGNER_ID

SIGNATURE_SUFFIX = ".signature.json"


def sign_bundle(bundle: Path, key: Path) -> Path:
    """Sign a bundle as Flower does: Ed25519 over the time (8 bytes, big-endian) and the SHA-256 of the bundle.

    Returns:
        The signature's file, beside the bundle.

    Raises:
        ConfigError: the key is no Ed25519 key in OpenSSH's format, or a file cannot be read or written.
    """
    try:
        private = load_ssh_private_key(key.read_bytes(), password=None)
        if not isinstance(private, ed25519.Ed25519PrivateKey):
            raise ConfigError(f"{key}: a bundle is signed with an Ed25519 key; make one with ssh-keygen -t ed25519")
        signed_at = int(time.time())
        signature = private.sign(signed_at.to_bytes(8, "big") + hashlib.sha256(bundle.read_bytes()).digest())
        record = {
            "public_key_id": SIGNER_ID,
            "signed_at": signed_at,
            "signature": base64.urlsafe_b64encode(signature).decode().rstrip("="),
        }
        target = bundle.with_name(bundle.name + SIGNATURE_SUFFIX)
        target.write_text(json.dumps(record))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{bundle}: cannot be signed with {key}: {error}") from error
    return target


def signature_of(bundle: Path) -> Path:
    """The signature that lies beside a bundle; raises ConfigError when there is none."""
    signature = bundle.with_name(bundle.name + SIGNATURE_SUFFIX)
    if not (bundle.is_file() and signature.is_file()):
        raise ConfigError(
            f"{bundle} and {signature.name} have to be there; `python -m trainer bundle` and "
            "`python -m stack.federation sign` make them"
        )
    return signature


@contextmanager
def serving_bundle(bundle: Path) -> Iterator[str]:
    """Answer the SuperLink's two questions about a bundle; yields the address for ``FLWR_SUPERGRID_API_URL``.

    The files are read for each answer, so a bundle can be replaced without a restart.
    """

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            verifications = [json.loads(signature_of(bundle).read_text())]
            self._answer(json.dumps({"fab_url": f"{url}/bundle", "verifications": verifications}).encode())

        def do_GET(self) -> None:
            self._answer(bundle.read_bytes())

        def _answer(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the SuperLink logs what it starts."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield url
        finally:
            server.shutdown()
