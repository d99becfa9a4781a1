"""The gateway's settings: refused by name when they are wrong, and no new ones unnoticed."""

import pytest

from gateway.audit import AuditSettings
from gateway.auth import AuthSettings
from gateway.quotas import LimitsSettings
from gateway.settings import GatewaySettings
from services.common.settings import Settings, load_settings
from services.contracts.errors import ConfigError


def load(*arguments: str) -> GatewaySettings:
    return load_settings(GatewaySettings, "python -m gateway", "help", arguments)


def test_defaults_are_those_of_the_design() -> None:
    settings = load()
    assert settings.port == 8080
    assert str(settings.inference_url) == "http://127.0.0.1:8103/"
    assert str(settings.safety_url) == "http://127.0.0.1:8101/"
    assert (settings.check_deadline_ms, settings.unit_characters, settings.unit_idle_ms) == (300, 200, 150)
    assert settings.context_characters == 1000


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--check-deadline-ms", "0"], "check_deadline_ms"),
        (["--safety-url", "nonsense"], "safety_url"),
        (["--inference-url", "ftp://host"], "inference_url"),
        (["--prompt-threshold", "1.5"], "prompt_threshold"),
        (["--held-limit-characters", "50"], "held_limit_characters must be at least 200"),
    ],
)
def test_bad_value_is_refused_by_name(arguments: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(*arguments)


def test_unknown_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDWARD_GATEWAY_FAIL_OPEN", "1")
    with pytest.raises(ConfigError, match="FEDWARD_GATEWAY_FAIL_OPEN"):
        load()


def test_no_setting_is_added_without_this_test_being_told() -> None:
    shared = {*Settings.model_fields, *AuthSettings.model_fields, *LimitsSettings.model_fields}
    assert sorted(set(GatewaySettings.model_fields) - shared - set(AuditSettings.model_fields)) == [
        "allowed_models",
        "breaker_failures",
        "breaker_seconds",
        "check_deadline_ms",
        "connect_seconds",
        "console",
        "context_characters",
        "critique_url",
        "generation_seconds",
        "held_limit_characters",
        "inference_url",
        "message_limit",
        "policy_file",
        "prompt_limit_characters",
        "prompt_threshold",
        "requests_in_flight",
        "response_threshold",
        "revise_seconds",
        "safety_calls_in_flight",
        "safety_url",
        "served_model_name",
        "silence_seconds",
        "unit_characters",
        "unit_idle_ms",
        "window_characters",
    ]
