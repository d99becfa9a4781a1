"""The signing keys of an OpenID Connect provider: fetched, kept, and fetched again when it rotates them.

Source: RFC 7517 (JSON Web Key Set), OpenID Connect Core section 10.1.1 (rotation of signing keys).
"""

import asyncio
import json
import time

import httpx
from jwt import PyJWK, PyJWKSet, PyJWTError

from services.common.http import unavailable
from services.common.logs import get_logger
from services.contracts.errors import UpstreamUnavailable

PROVIDER = "identity provider"
FETCH_SECONDS = 5.0
LARGEST_ANSWER = 1_000_000  # bytes; a set of a hundred RSA keys has a tenth of it


class SigningKeys:
    """The keys behind a JWKS URL.

    Args:
        url: where the provider publishes them.
        refresh_seconds: keys older than this are fetched again in the background, so that a withdrawn one is dropped.
        max_age_seconds: keys older than this are not trusted any more, although nothing newer can be had.
        gap_seconds: the shortest time between two fetches, whatever key ids tokens name.
    """

    def __init__(self, url: str, *, refresh_seconds: float, max_age_seconds: float, gap_seconds: float) -> None:
        self._url = url
        self._refresh_seconds = refresh_seconds
        self._max_age_seconds = max_age_seconds
        self._gap_seconds = gap_seconds
        self._client = httpx.AsyncClient(timeout=FETCH_SECONDS)
        self._lock = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._keys: list[PyJWK] = []
        self._fetched_at = self._tried_at = float("-inf")

    async def find(self, key_id: str | None) -> PyJWK | None:
        """The key of that id; without an id the only key, where there is only one. None when there is none.

        Raises:
            UpstreamUnavailable: no keys could be fetched, or only such as are too old to be trusted.
        """
        if self._age() > self._max_age_seconds:
            await self._fetch()
            if self._age() > self._max_age_seconds:
                raise UpstreamUnavailable(PROVIDER, "its signing keys cannot be fetched, so no token can be checked")
        elif self._age() > self._refresh_seconds and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = asyncio.create_task(self._fetch())
        key = self._known(key_id)
        if key is None:
            await self._fetch()
            key = self._known(key_id)
        return key

    async def close(self) -> None:
        """Stop fetching."""
        if self._refreshing is not None:
            self._refreshing.cancel()
            await asyncio.gather(self._refreshing, return_exceptions=True)
        await self._client.aclose()

    def _age(self) -> float:
        return time.monotonic() - self._fetched_at

    def _known(self, key_id: str | None) -> PyJWK | None:
        if key_id is None:
            return self._keys[0] if len(self._keys) == 1 else None
        return next((key for key in self._keys if key.key_id == key_id), None)

    async def _fetch(self) -> None:
        """Fetch the keys, unless that was tried a moment ago; on failure those that are known stay."""
        async with self._lock:
            if time.monotonic() - self._tried_at < self._gap_seconds:
                return
            self._tried_at = time.monotonic()
            try:
                async with asyncio.timeout(FETCH_SECONDS):
                    self._keys = _signing_keys(await self._download())
            except TimeoutError:
                reason = f"no answer within {FETCH_SECONDS:g} s"
            except httpx.RequestError as error:
                reason = unavailable(PROVIDER, error).message
            except UpstreamUnavailable as error:
                reason = error.message
            else:
                self._fetched_at = time.monotonic()
                get_logger().info("signing keys fetched", keys=[key.key_id for key in self._keys])
                return
            get_logger().error("signing keys not fetched", url=self._url, reason=reason)

    async def _download(self) -> bytes:
        body = b""
        async with self._client.stream("GET", self._url, headers={"accept": "application/json"}) as response:
            if response.status_code != httpx.codes.OK:
                raise UpstreamUnavailable(PROVIDER, f"HTTP {response.status_code}")
            async for part in response.aiter_bytes():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise UpstreamUnavailable(PROVIDER, f"its key set has more than {LARGEST_ANSWER} bytes")
        return body


def _signing_keys(body: bytes) -> list[PyJWK]:
    """The public signing keys of a key set; raises UpstreamUnavailable when it has none."""
    try:
        keys = PyJWKSet.from_dict(json.loads(body)).keys
    except (PyJWTError, ValueError, AttributeError, TypeError) as error:
        raise UpstreamUnavailable(PROVIDER, "its key set cannot be read") from error
    # "oct" is a shared secret: a token that it verifies could have been made by anyone who reads this URL.
    signing = [key for key in keys if key.key_type != "oct" and key.public_key_use in (None, "sig")]
    long_enough = [key for key in signing if key.Algorithm.check_key_length(key.key) is None]
    if not long_enough:
        raise UpstreamUnavailable(PROVIDER, "its key set holds no public signing key of a safe length")
    return long_enough
