"""API keys: what the file holds, who may edit it, what a request with a key is taken for."""

import asyncio
import json
import multiprocessing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gateway.api_keys import KeysFile, NewKey, add_key, new_key, read_keys, revoke_key
from gateway.auth import Authenticator, AuthSettings, Identity
from gateway.exposure import is_loopback, require_safe_start
from gateway.keys_command import FILE_VARIABLE, main
from services.contracts.errors import ConfigError, Unauthorized


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def authenticator(path: Path) -> Authenticator:
    return Authenticator(AuthSettings(auth="keys", keys_file=path))


def identify(auth: Authenticator, authorization: str | None) -> Identity:
    return asyncio.run(auth.identify({} if authorization is None else {"authorization": authorization}))


def added(path: Path, tenant: str = "acme", name: str = "backend", expires: datetime | None = None) -> NewKey:
    new = new_key(tenant, name, expires)
    add_key(path, new)
    return new


def look_until_settled(auth: Authenticator) -> None:
    """A changed file is read at the second look that finds it the same."""
    (file,) = auth.files
    file.look()
    file.look()


def test_key_names_its_tenant(keys_file: Path) -> None:
    new = added(keys_file)
    other = added(keys_file, "globex", "app")
    auth = authenticator(keys_file)
    assert identify(auth, f"Bearer {new.secret}") == Identity("acme", "backend")
    assert identify(auth, f"bearer  {other.secret}") == Identity("globex", "app")


def test_file_has_hashes_only_and_is_private(keys_file: Path) -> None:
    new = added(keys_file)
    assert new.secret.startswith("fw-")
    assert len(new.secret) == 3 + 43  # 256 bits in base64
    assert new.secret not in keys_file.read_text()
    assert new.secret[3:] not in keys_file.read_text()
    assert keys_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("authorization", "message", "challenge"),
    [
        (None, "no credentials", 'Bearer realm="fedward"'),
        ("", "no credentials", 'Bearer realm="fedward"'),
        ("Basic dXNlcjpwYXNz", "must be 'Bearer", 'error="invalid_request"'),
        ("Bearer", "must be 'Bearer", 'error="invalid_request"'),
        ("Bearer two words", "must be 'Bearer", 'error="invalid_request"'),
        ("Bearer fw-unknown", "not known", 'error="invalid_token"'),
        ("Bearer something-else", "no API key", 'error="invalid_token"'),
    ],
)
def test_refusals_say_what_is_wanted(keys_file: Path, authorization: str | None, message: str, challenge: str) -> None:
    added(keys_file)
    with pytest.raises(Unauthorized, match=message) as caught:
        identify(authenticator(keys_file), authorization)
    assert caught.value.http_status == 401
    assert challenge in caught.value.headers["www-authenticate"]
    assert caught.value.body()["error"]["code"] == "invalid_api_key"
    if authorization and "fw-" in authorization:
        assert "fw-unknown" not in caught.value.message + str(caught.value.headers)


@given(st.text(max_size=60))
@settings(max_examples=30)
def test_no_authorization_header_breaks_it(text: str) -> None:
    auth = Authenticator.__new__(Authenticator)
    auth._none, auth._tokens, auth._keys = False, None, None
    with pytest.raises(Unauthorized):
        identify(auth, text)
    with pytest.raises(Unauthorized):
        identify(auth, f"Bearer {text}")


def test_expired_and_revoked_keys_are_refused(keys_file: Path) -> None:
    old = added(keys_file, name="old", expires=datetime.now(UTC) - timedelta(seconds=1))
    new = added(keys_file, name="new", expires=datetime.now(UTC) + timedelta(days=1))
    gone = added(keys_file, name="gone")
    revoke_key(keys_file, "acme", "gone")
    auth = authenticator(keys_file)
    assert identify(auth, f"Bearer {new.secret}").key_name == "new"
    with pytest.raises(Unauthorized, match="expired"):
        identify(auth, f"Bearer {old.secret}")
    with pytest.raises(Unauthorized, match="revoked"):
        identify(auth, f"Bearer {gone.secret}")


def test_running_gateway_takes_up_a_new_key_and_a_revocation(keys_file: Path) -> None:
    first = added(keys_file, name="first")
    auth = authenticator(keys_file)
    second = added(keys_file, name="second")
    look_until_settled(auth)
    assert identify(auth, f"Bearer {second.secret}").key_name == "second"
    revoke_key(keys_file, "acme", "first")
    look_until_settled(auth)
    with pytest.raises(Unauthorized, match="revoked"):
        identify(auth, f"Bearer {first.secret}")


def test_broken_file_leaves_the_keys_in_force_and_is_a_problem(keys_file: Path) -> None:
    new = added(keys_file)
    auth = authenticator(keys_file)
    (file,) = auth.files
    good = keys_file.read_bytes()
    keys_file.write_bytes(good[:-20])
    look_until_settled(auth)
    assert identify(auth, f"Bearer {new.secret}").tenant == "acme"
    assert str(keys_file) in (file.problem or "")
    keys_file.write_bytes(good)
    look_until_settled(auth)
    assert file.problem is None
    keys_file.unlink()
    look_until_settled(auth)
    assert file.problem is not None
    assert identify(auth, f"Bearer {new.secret}").tenant == "acme"


def test_second_key_of_a_name_is_refused_and_nothing_changes(keys_file: Path) -> None:
    added(keys_file)
    before = keys_file.read_bytes()
    with pytest.raises(ConfigError, match="has a key named backend"):
        added(keys_file)
    assert keys_file.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "Invalid JSON"),
        (b'{"keys": [{"sha256": "00"}]}', r"keys.0.sha256"),
        (b'{"keys": [], "secret": 1}', "secret"),
        (b'{"schema_version": 2}', "schema_version"),
    ],
)
def test_malformed_file_is_named(keys_file: Path, content: bytes, message: str) -> None:
    keys_file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_keys(keys_file)
    assert str(keys_file) in caught.value.message


def test_file_that_others_may_write_is_refused(keys_file: Path) -> None:
    added(keys_file)
    keys_file.chmod(0o660)
    with pytest.raises(ConfigError, match="chmod go-w"):
        authenticator(keys_file)


def test_two_entries_cannot_share_a_hash_or_a_name() -> None:
    entry = new_key("acme", "a").entry
    with pytest.raises(ValidationError, match="same sha256"):
        KeysFile(keys=(entry, entry.model_copy(update={"name": "b"})))
    with pytest.raises(ValidationError, match="same tenant and name"):
        KeysFile(keys=(entry, new_key("acme", "a").entry))


def _add_many(path: Path, worker: int) -> None:
    for i in range(10):
        added(path, name=f"key-{worker}-{i}")


def test_parallel_writers_lose_no_key(keys_file: Path) -> None:
    workers = [multiprocessing.get_context("fork").Process(target=_add_many, args=(keys_file, i)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=30)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(read_keys(keys_file).keys) == 40


def test_commands(keys_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--file", str(keys_file), "--tenant", "acme", "--name", "backend"]
    assert main(["create", *common, "--expires-days", "30"]) == 0
    shown = capsys.readouterr()
    secret = shown.out.strip()
    assert identify(authenticator(keys_file), f"Bearer {secret}") == Identity("acme", "backend")
    assert secret not in shown.err
    assert main(["list", "--file", str(keys_file)]) == 0
    assert capsys.readouterr().out.startswith("acme  backend  active  created ")
    assert main(["revoke", *common]) == 0
    assert main(["list", "--file", str(keys_file)]) == 0
    assert "acme  backend  revoked" in capsys.readouterr().out


def test_commands_take_the_file_from_the_environment(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 2
    assert "give --file" in capsys.readouterr().err
    monkeypatch.setenv(FILE_VARIABLE, str(keys_file))
    assert main(["create", "--tenant", "acme", "--name", "a"]) == 0
    assert keys_file.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["revoke", "--tenant", "acme", "--name", "none"], "no key named none"),
        (["list"], "cannot read the API keys"),
    ],
)
def test_commands_fail_in_words(
    keys_file: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--file", str(keys_file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a b", "a:b", "-a", "a" * 65, "ü", "a/b"])
def test_names_are_plain(name: str, keys_file: Path) -> None:
    with pytest.raises(SystemExit):
        main(["create", "--file", str(keys_file), "--tenant", name, "--name", "a"])
    assert not keys_file.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"auth": "keys"}, "needs keys_file"),
        ({"auth": "jwt", "jwt_issuer": "a"}, "needs jwt_audience, jwks_url"),
        ({"auth": "jwt", "jwt_algorithms": ["HS256"]}, "jwt_algorithms"),
        ({"auth": "jwt", "jwt_algorithms": ["none"]}, "jwt_algorithms"),
        ({"auth": "jwt", "jwt_algorithms": []}, "jwt_algorithms"),
        ({"jwks_url": "http://issuer.example/keys"}, "must be https"),
        ({"auth": "password"}, "auth"),
    ],
)
def test_contradictory_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AuthSettings.model_validate(values)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost"])
def test_development_needs_no_key_on_loopback(host: str) -> None:
    assert is_loopback(host)
    require_safe_start(host, auth="none", insecure_no_auth=False, audit_key_file=None)
    assert identify(Authenticator(AuthSettings()), None) == Identity("default", None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "192.168.1.1", "gateway.example", ""])
def test_nothing_starts_open_where_others_can_reach_it(host: str) -> None:
    key = Path("audit.key")
    with pytest.raises(ConfigError, match="--insecure-no-auth"):
        require_safe_start(host, auth="none", insecure_no_auth=False, audit_key_file=key)
    with pytest.raises(ConfigError, match="--audit-key-file"):
        require_safe_start(host, auth="keys", insecure_no_auth=False, audit_key_file=None)
    require_safe_start(host, auth="none", insecure_no_auth=True, audit_key_file=key)
    require_safe_start(host, auth="jwt", insecure_no_auth=False, audit_key_file=key)


def test_json_of_the_file_is_as_documented(keys_file: Path) -> None:
    added(keys_file)
    content = json.loads(keys_file.read_text())
    assert content["schema_version"] == 1
    assert set(content["keys"][0]) == {"sha256", "tenant", "name", "created", "expires", "revoked"}
