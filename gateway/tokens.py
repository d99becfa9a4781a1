"""JSON Web Tokens of an OpenID Connect provider: checked, and read for the tenant that they name."""

import re

import jwt

from gateway.auth import AuthSettings
from gateway.jwt_keys import SigningKeys
from services.contracts.errors import Unauthorized

LONGEST_TOKEN = 16_384  # characters
TENANT = r"[!-~]{1,128}"  # visible ASCII
# The first that fits counts, so more particular errors stand before their parents.
WORDS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "the token has expired"),
    (jwt.ImmatureSignatureError, "the token is not valid yet"),
    (jwt.InvalidAudienceError, "the token is for another audience"),
    (jwt.InvalidIssuerError, "the token is of another issuer"),
    (jwt.InvalidAlgorithmError, "the token is signed in a way that is not accepted here"),
    (jwt.InvalidSignatureError, "the token's signature is not valid"),
    (jwt.MissingRequiredClaimError, "the token lacks one of the claims exp, iss and aud"),
)


class TokenReader:
    """Checks tokens against an issuer's signing keys."""

    def __init__(self, settings: AuthSettings) -> None:
        self._settings = settings
        self._keys = SigningKeys(
            str(settings.jwks_url),
            refresh_seconds=settings.jwks_refresh_seconds,
            max_age_seconds=settings.jwks_max_age_seconds,
            gap_seconds=settings.jwks_gap_seconds,
        )

    async def tenant(self, token: str) -> str:
        """The tenant that a valid token names; ``sub:<subject>`` when only its subject says who it is.

        The prefix keeps a user whose subject is another tenant's name from being taken for that tenant.

        Raises:
            Unauthorized: the token is not valid; the message does not quote it.
            UpstreamUnavailable: the issuer's keys cannot be fetched.
        """
        if len(token) > LONGEST_TOKEN:
            raise _invalid(f"the token is longer than {LONGEST_TOKEN} characters")
        try:
            header = jwt.get_unverified_header(token)
            if header.get("alg") not in self._settings.jwt_algorithms:  # before a key is fetched for it
                raise jwt.InvalidAlgorithmError
            key = await self._keys.find(header.get("kid"))
            if key is None:
                raise _invalid("the token is signed with a key that its issuer does not publish")
            claims = jwt.decode(
                token,
                key,
                algorithms=self._settings.jwt_algorithms,
                audience=self._settings.jwt_audience,
                issuer=self._settings.jwt_issuer,
                leeway=self._settings.jwt_leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (jwt.PyJWTError, ValueError) as error:
            words = next(
                (words for kind, words in WORDS if isinstance(error, kind)), "this is no token that can be read"
            )
            raise _invalid(words) from error
        named = claims.get(self._settings.jwt_tenant_claim)
        tenant = named if named is not None else f"sub:{claims.get('sub', '')}"
        if not isinstance(tenant, str) or not re.fullmatch(TENANT, tenant) or tenant == "sub:":
            raise _invalid(f"the token's claim {self._settings.jwt_tenant_claim!r} (or 'sub') does not name a tenant")
        return tenant

    async def close(self) -> None:
        """Close the connection to the issuer."""
        await self._keys.close()


def _words(error: Exception) -> str:
    """What is wrong, in our words: the library's may quote the token."""
    return next((words for kind, words in WORDS if isinstance(error, kind)), "this is no token that can be read")


def _invalid(message: str) -> Unauthorized:
    return Unauthorized(message, error="invalid_token")
