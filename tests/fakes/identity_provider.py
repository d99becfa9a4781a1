"""An OpenID Connect provider on a real socket: it publishes signing keys, rotates them, fails, and signs tokens."""

import base64
import json
import time
from dataclasses import dataclass, field
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from starlette.types import Receive, Scope, Send

ISSUER = "https://issuer.example"
AUDIENCE = "fedward"


@dataclass
class SigningKey:
    """A private key with its id and the algorithm it signs by."""

    kid: str
    algorithm: str = "ES256"
    private: Any = None

    def __post_init__(self) -> None:
        if self.private is None:
            rsa_key = self.algorithm.startswith("RS")
            self.private = rsa.generate_private_key(65537, 2048) if rsa_key else ec.generate_private_key(ec.SECP256R1())

    def public(self) -> dict[str, Any]:
        kind = RSAAlgorithm if self.algorithm.startswith("RS") else ECAlgorithm
        return kind.to_jwk(self.private.public_key(), as_dict=True) | {"kid": self.kid, "use": "sig"}

    def token(self, *, header: dict[str, Any] | None = None, **claims: Any) -> str:
        """A token that is valid, but for the claims and header fields given here; ``...`` leaves one out."""
        now = int(time.time())
        usual = {"iss": ISSUER, "aud": AUDIENCE, "exp": now + 7200, "iat": now, "sub": "user-1", "tenant": "acme"}
        wanted = {name: value for name, value in (usual | claims).items() if value is not ...}
        headers = {name: value for name, value in ({"kid": self.kid} | (header or {})).items() if value is not ...}
        return jwt.encode(wanted, self.private, algorithm=self.algorithm, headers=headers)


def unsigned(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    """A token put together by hand, as an attacker would."""
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


@dataclass
class FakeProvider:
    """Serves a key set; ``status`` and ``body`` replace the answer by another."""

    keys: list[SigningKey] = field(default_factory=list)
    status: int = 200
    body: bytes | None = None
    fetches: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        self.fetches += 1
        body = self.body
        if body is None:
            body = json.dumps({"keys": [key.public() for key in self.keys]}).encode()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})
