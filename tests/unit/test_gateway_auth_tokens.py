"""Tokens of an identity provider that runs in a thread: what is accepted, what is refused, rotation, failure."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from gateway.auth import Authenticator, AuthSettings, Identity
from services.contracts.errors import Unauthorized, UpstreamUnavailable
from tests.fakes.gateway_upstreams import closed_port, serving
from tests.fakes.identity_provider import AUDIENCE, ISSUER, FakeProvider, SigningKey, unsigned

SHARED_SECRET = json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0" * 10, "kid": "one", "alg": "HS256"}]}).encode()
KEY, OTHER, RSA = SigningKey("one"), SigningKey("two"), SigningKey("rsa", "RS256")


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[FakeProvider, str]]:
    fake = FakeProvider()
    with serving(fake) as url:
        yield fake, f"{url}/keys"


@pytest.fixture
def provider(running: tuple[FakeProvider, str]) -> FakeProvider:
    vars(running[0]).update(vars(FakeProvider(keys=[KEY, RSA])))
    return running[0]


Ask = Callable[..., Identity]


@pytest.fixture
def ask(provider: FakeProvider, running: tuple[FakeProvider, str]) -> Ask:
    """Identify one token by a fresh authenticator."""

    def one(token: str, **settings: Any) -> Identity:
        found: Identity = with_auth(running[1], lambda auth: identify(auth, token), **settings)
        return found

    return one


def with_auth(url: str, work: Callable[[Authenticator], Coroutine[Any, Any, Any]], **settings: Any) -> Any:
    async def run() -> Any:
        values = {"auth": "jwt", "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwks_url": url} | settings
        auth = Authenticator(AuthSettings.model_validate(values))
        try:
            return await work(auth)
        finally:
            await auth.close()

    return asyncio.run(run())


async def identify(auth: Authenticator, token: str) -> Identity:
    return await auth.identify({"authorization": f"Bearer {token}"})


@pytest.mark.parametrize("key", [KEY, RSA], ids=lambda key: key.algorithm)
def test_valid_token_names_its_tenant(ask: Ask, key: SigningKey) -> None:
    assert ask(key.token()) == Identity("acme", None)


def test_tenant_claim_is_configurable_and_the_subject_is_marked(ask: Ask) -> None:
    assert ask(KEY.token(org="globex"), jwt_tenant_claim="org").tenant == "globex"
    # A user whose subject is another tenant's name is not that tenant.
    assert ask(KEY.token(tenant=..., sub="acme")).tenant == "sub:acme"


def test_audience_may_be_a_list_and_clocks_may_differ_a_little(ask: Ask) -> None:
    assert ask(KEY.token(aud=["other", AUDIENCE])).tenant == "acme"
    assert ask(KEY.token(exp=int(time.time()) - 5), jwt_leeway_seconds=30).tenant == "acme"


NOW = int(time.time())


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (KEY.token(exp=NOW - 100), "has expired"),
        (KEY.token(nbf=NOW + 1000), "not valid yet"),
        (KEY.token(iat=NOW + 1000), "not valid yet"),
        (KEY.token(aud="another"), "another audience"),
        (KEY.token(iss="https://other.example"), "another issuer"),
        (KEY.token(exp=...), "lacks one of the claims"),
        (KEY.token(aud=...), "lacks one of the claims"),
        (KEY.token(iss=...), "lacks one of the claims"),
        (KEY.token(tenant=["acme"]), "does not name a tenant"),
        (KEY.token(tenant="a b"), "does not name a tenant"),
        (KEY.token(tenant=""), "does not name a tenant"),
        (KEY.token(tenant="x" * 129), "does not name a tenant"),
        (KEY.token(tenant=..., sub=...), "does not name a tenant"),
        (KEY.token()[:-6] + "AAAAAA", "signature is not valid"),
        (SigningKey("one").token(), "signature is not valid"),
        (OTHER.token(), "does not publish"),
        (KEY.token(header={"kid": ...}), "does not publish"),
        (unsigned({"alg": "none"}, {"tenant": "acme"}), "not accepted here"),
        (unsigned({"alg": "None", "kid": "one"}, {"tenant": "acme"}), "not accepted here"),
        (unsigned({"alg": "HS256", "kid": "one"}, {"tenant": "acme"}, b"x"), "not accepted here"),
        (unsigned({"alg": "RS256", "kid": "one"}, {"tenant": "acme"}, b"x"), "not accepted here"),  # the key is ES256
        (unsigned({"kid": "one"}, {"tenant": "acme"}), "not accepted here"),
        (unsigned({"alg": "ES256", "kid": 7}, {"tenant": "acme"}), "no token"),
        (unsigned({"alg": ["ES256"]}, {}), "no token|not accepted"),
        ("a.b.c", "no token"),
        ("no-token-at-all", "no token"),
        ("x" * 20_000, "longer than"),
    ],
)
def test_refused_tokens_are_not_quoted(ask: Ask, token: str, message: str) -> None:
    with pytest.raises(Unauthorized, match=message) as caught:
        ask(token)
    assert caught.value.http_status == 401
    challenge = caught.value.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="fedward", error="invalid_token", error_description="')
    assert token not in caught.value.message + challenge
    assert caught.value.message.isascii()


def test_public_key_is_no_shared_secret(ask: Ask) -> None:
    """The classic confusion: HS256 with the published RSA key as the secret."""
    pem = RSA.private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    claims = {"iss": ISSUER, "aud": AUDIENCE, "exp": NOW + 600, "tenant": "acme"}
    start = unsigned({"alg": "HS256", "kid": "rsa"}, claims).rsplit(".", 1)[0]
    signature = hmac.digest(pem, start.encode(), hashlib.sha256)
    forged = unsigned({"alg": "HS256", "kid": "rsa"}, claims, signature)
    with pytest.raises(Unauthorized, match="not accepted here"):
        ask(forged)


RANDOM_TOKENS = st.one_of(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1),
    st.builds(lambda raw: unsigned({"alg": "ES256", "kid": "one"}, {"x": raw.hex()}, raw), st.binary()),
)


@given(st.lists(RANDOM_TOKENS, min_size=1, max_size=20))
@settings(max_examples=20)
def test_no_token_breaks_the_reader(running: tuple[FakeProvider, str], tokens: list[str]) -> None:
    running[0].keys = [KEY]

    async def work(auth: Authenticator) -> None:
        for token in tokens:
            with pytest.raises(Unauthorized):
                await identify(auth, token)

    with_auth(running[1], work)


class Clock:
    """The reader's clock, which a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("gateway.jwt_keys.time", clock)
    return clock


def test_rotation_is_followed_and_fetches_are_rationed(
    provider: FakeProvider, running: tuple[FakeProvider, str], clock: Clock
) -> None:
    async def work(auth: Authenticator) -> None:
        for _ in range(3):
            assert (await identify(auth, KEY.token())).tenant == "acme"
        assert provider.fetches == 1
        provider.keys = [OTHER]
        clock.now += 9.9
        for _ in range(5):  # within the gap nobody is asked again, whatever is claimed
            with pytest.raises(Unauthorized, match="does not publish"):
                await identify(auth, OTHER.token())
        assert provider.fetches == 1
        clock.now += 0.2
        results = await asyncio.gather(*(identify(auth, OTHER.token()) for _ in range(20)))
        assert [result.tenant for result in results] == ["acme"] * 20
        assert provider.fetches == 2  # one for all of them
        with pytest.raises(Unauthorized, match="does not publish"):  # the old key is gone
            await identify(auth, KEY.token())

    with_auth(running[1], work)


def test_withdrawn_key_is_dropped_in_the_background(
    provider: FakeProvider, running: tuple[FakeProvider, str], clock: Clock
) -> None:
    async def work(auth: Authenticator) -> None:
        await identify(auth, KEY.token())
        provider.keys = [OTHER]
        clock.now += 301
        assert (await identify(auth, KEY.token())).tenant == "acme"  # nobody waits for the refresh
        for _ in range(1000):
            try:
                await identify(auth, KEY.token())
            except Unauthorized:
                return
            await asyncio.sleep(0.01)
        pytest.fail("the withdrawn key is still trusted")

    with_auth(running[1], work)


def test_known_keys_survive_an_outage_but_not_for_ever(
    provider: FakeProvider, running: tuple[FakeProvider, str], clock: Clock
) -> None:
    async def work(auth: Authenticator) -> None:
        await identify(auth, KEY.token())
        provider.status = 503
        clock.now += 86_390
        assert (await identify(auth, KEY.token())).tenant == "acme"
        clock.now += 11
        with pytest.raises(UpstreamUnavailable, match="identity provider"):
            await identify(auth, KEY.token())
        provider.status = 200
        clock.now += 11
        assert (await identify(auth, KEY.token())).tenant == "acme"

    with_auth(running[1], work)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (302, b"{}"),
        (200, b"not json"),
        (200, b"[]"),
        (200, b'{"keys": []}'),
        (200, b'{"keys": 7}'),
        (200, SHARED_SECRET),
        (200, b'{"keys": ["' + b"x" * 1_100_000 + b'"]}'),
    ],
    ids=["500", "redirect", "no-json", "list", "empty", "number", "shared-secret", "too-large"],
)
def test_without_usable_keys_nobody_is_let_in(ask: Ask, provider: FakeProvider, status: int, body: bytes) -> None:
    provider.status, provider.body = status, body
    with pytest.raises(UpstreamUnavailable, match="identity provider") as caught:
        ask(KEY.token())
    assert caught.value.http_status == 503


def test_short_rsa_key_is_not_used(ask: Ask, provider: FakeProvider) -> None:
    weak = rsa.generate_private_key(65537, 1024)
    public = RSAAlgorithm.to_jwk(weak.public_key(), as_dict=True) | {"kid": "weak"}
    provider.body = json.dumps({"keys": [public]}).encode()
    with pytest.raises(UpstreamUnavailable):
        ask(KEY.token())


def test_unreachable_provider_is_unavailable() -> None:
    with pytest.raises(UpstreamUnavailable, match="cannot be fetched"):
        with_auth(closed_port(), lambda auth: identify(auth, KEY.token()))


def test_keys_and_tokens_side_by_side(provider: FakeProvider, running: tuple[FakeProvider, str], tmp_path: Any) -> None:
    from gateway.api_keys import add_key, new_key

    new = new_key("globex", "app")
    add_key(tmp_path / "keys.json", new)

    async def work(auth: Authenticator) -> None:
        assert await identify(auth, new.secret) == Identity("globex", "app")
        assert await identify(auth, KEY.token()) == Identity("acme", None)
        with pytest.raises(Unauthorized, match="not known"):
            await identify(auth, "fw-guess")

    with_auth(running[1], work, auth="keys+jwt", keys_file=tmp_path / "keys.json")
