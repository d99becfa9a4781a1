"""Who is asking: an API key or a signed token, turned into a tenant.

::

    Authorization: Bearer fw-...    an API key: its sha256 is looked up in the keys file
    Authorization: Bearer eyJ...    a JSON Web Token of the OpenID Connect provider: signature, issuer, audience, time

Source: RFC 6750 (bearer tokens), RFC 8725 (best practice for JSON Web Tokens).
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import AnyHttpUrl, BaseModel, ConfigDict, Field, model_validator

from gateway.api_keys import PREFIX, find_key, index_keys
from gateway.exposure import is_loopback
from gateway.watched_file import WatchedFile
from services.contracts.errors import Unauthorized

# Asymmetric only: with a shared secret whoever can check a token can make one.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]


class AuthSettings(BaseModel):
    """How callers prove who they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auth: Literal["none", "keys", "jwt", "keys+jwt"] = Field(
        default="none", description="how callers are identified; none only on a loopback address"
    )
    insecure_no_auth: bool = Field(
        default=False, description="serve without identification on an address that others can reach"
    )
    keys_file: Path | None = Field(default=None, description="API keys, as python -m gateway keys writes them")
    jwt_issuer: str | None = Field(default=None, description="the issuer that tokens have to name")
    jwt_audience: str | None = Field(default=None, description="the audience that tokens have to be for")
    jwks_url: AnyHttpUrl | None = Field(default=None, description="where the issuer publishes its signing keys")
    jwt_tenant_claim: str = Field(default="tenant", description="claim that names the tenant; without it: the subject")
    jwt_algorithms: tuple[Algorithm, ...] = Field(
        default=("RS256", "ES256"), min_length=1, description="signature algorithms that are accepted"
    )
    jwt_leeway_seconds: float = Field(default=30.0, ge=0, le=300, description="how far clocks may differ")
    jwks_refresh_seconds: float = Field(default=300.0, gt=0, description="signing keys are fetched again after this")
    jwks_max_age_seconds: float = Field(
        default=86_400.0, gt=0, description="older signing keys are not trusted although no newer can be fetched"
    )
    jwks_gap_seconds: float = Field(default=10.0, ge=0, description="shortest time between two fetches of signing keys")

    @model_validator(mode="after")
    def _what_the_mode_needs(self) -> Self:
        if "keys" in self.auth and self.keys_file is None:
            raise ValueError(f"auth {self.auth} needs keys_file; make one: python -m gateway keys create")
        if "jwt" in self.auth:
            wanted = {"jwt_issuer": self.jwt_issuer, "jwt_audience": self.jwt_audience, "jwks_url": self.jwks_url}
            if missing := [name for name, value in wanted.items() if not value]:
                raise ValueError(f"auth {self.auth} needs {', '.join(missing)}")
        url = self.jwks_url
        if url is not None and url.scheme != "https" and not is_loopback(url.host or ""):
            raise ValueError("jwks_url must be https: whoever can change the answer could sign any token")
        return self


class Identity(NamedTuple):
    """Who is asking; ``key_name`` is the API key's name, None for a token."""

    tenant: str
    key_name: str | None = None


NOBODY_IN_PARTICULAR = Identity("default")


class Authenticator:
    """Turns a request's headers into an identity.

    Raises:
        ConfigError: the keys file cannot be read.
    """

    def __init__(self, settings: AuthSettings) -> None:
        self._none = settings.auth == "none"
        self._keys = None
        if "keys" in settings.auth and settings.keys_file is not None:
            self._keys = WatchedFile(settings.keys_file, index_keys)
        self._tokens = None
        if "jwt" in settings.auth:
            from gateway.tokens import TokenReader  # brings cryptography, 8 MB, which other modes do without

            self._tokens = TokenReader(settings)

    async def identify(self, headers: Mapping[str, str]) -> Identity:
        """Who sent these headers (names in lower case, or a mapping that ignores case).

        Raises:
            Unauthorized: there is no credential, or none that is valid.
            UpstreamUnavailable: a token cannot be checked because its issuer's keys cannot be fetched.
        """
        if self._none:
            return NOBODY_IN_PARTICULAR
        credential = _bearer(headers)
        if self._keys is not None and credential.startswith(PREFIX):
            return self._by_key(credential)
        if self._tokens is not None:
            return Identity(await self._tokens.tenant(credential))
        raise Unauthorized("this is no API key of this gateway", error="invalid_token")

    @property
    def files(self) -> list[WatchedFile[Any]]:
        """The files to be watched."""
        return [self._keys] if self._keys else []

    async def close(self) -> None:
        """Close the connection to the identity provider."""
        if self._tokens is not None:
            await self._tokens.close()

    def _by_key(self, secret: str) -> Identity:
        assert self._keys is not None
        key = find_key(self._keys.current, secret)
        if key is None:
            raise Unauthorized("this API key is not known", error="invalid_token")
        state = key.state(datetime.now(UTC))
        if state != "active":
            raise Unauthorized(f"this API key is {state}", error="invalid_token")
        return Identity(key.tenant, key.name)


def _bearer(headers: Mapping[str, str]) -> str:
    """The credential of the Authorization header; raises Unauthorized when there is none."""
    value = headers.get("authorization", "")
    if not value:
        raise Unauthorized("no credentials; send the header 'Authorization: Bearer <API key or token>'")
    found = re.fullmatch(r"bearer +([!-~]+) *", value, flags=re.IGNORECASE)
    if found is None:
        raise Unauthorized("the Authorization header must be 'Bearer <API key or token>'", error="invalid_request")
    return found.group(1)
