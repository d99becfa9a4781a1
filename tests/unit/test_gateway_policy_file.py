"""The policy file: what it means, what is said about a wrong one, and how a new one comes into force."""

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import structlog
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

import gateway.watched_file
from gateway.__main__ import main
from gateway.policy import Action, CategoryPolicy, DirectionPolicy, Policy, StreamPolicy
from gateway.policy_file import PolicySet, Route, parse_policies, read_policies
from gateway.policy_yaml import LIMIT_BYTES
from gateway.watched_file import WatchedFile, watching
from services.contracts.errors import ConfigError
from tests.meta.test_import_layers import ROOT

EXAMPLE = ROOT / "gateway" / "policy.example.yaml"
MANUAL = (ROOT / "docs" / "policy.md").read_text()


def parsed(text: str) -> PolicySet:
    return parse_policies(f"schema_version: 1\n{dedent(text)}".encode(), "policy.yaml")


LAYERS = """
    default:
      check_deadline_ms: 100
      models: [a, b]
      system_prompt: Be brief.
      response: {threshold: 0.9, categories: {S4: {threshold: 0.3}}}
    routes:
      chat:
        check_deadline_ms: 200
        stream: {idle_ms: 20}
    tenants:
      acme:
        check_deadline_ms: 300
        models: [c]
        response: {threshold: 0.8, categories: {S4: {action: redact}, S9: {action: refuse}}}
        routes:
          generate: {check_deadline_ms: 400, system_prompt: null}
      plain: {}
"""


@pytest.mark.parametrize(
    ("tenant", "route", "deadline", "models", "prompt", "threshold", "idle"),
    [
        (None, "completions", 100, ("a", "b"), "Be brief.", 0.9, 150),
        (None, "chat", 200, ("a", "b"), "Be brief.", 0.9, 20),
        ("unknown", "chat", 200, ("a", "b"), "Be brief.", 0.9, 20),
        ("plain", "chat", 200, ("a", "b"), "Be brief.", 0.9, 20),
        ("acme", "completions", 300, ("c",), "Be brief.", 0.8, 150),
        ("acme", "chat", 300, ("c",), "Be brief.", 0.8, 20),
        ("acme", "generate", 400, ("c",), None, 0.8, 150),
    ],
)
def test_layers_override_field_by_field(
    tenant: str | None,
    route: str,
    deadline: int,
    models: tuple[str, ...],
    prompt: str | None,
    threshold: float,
    idle: int,
) -> None:
    policy = parsed(LAYERS).of(tenant, Route(route))
    assert (policy.check_deadline_ms, policy.models, policy.system_prompt) == (deadline, models, prompt)
    assert (policy.response.threshold, policy.stream.idle_ms) == (threshold, idle)
    s4 = policy.response.categories
    action = Action.REDACT if tenant == "acme" else None
    assert {k.value: v for k, v in s4.items()}["S4"] == CategoryPolicy(threshold=0.3, action=action)


def test_least_file_is_the_built_in_policy() -> None:
    policies = parsed("")
    assert policies == PolicySet.uniform(Policy())
    assert policies.sha256 == PolicySet.uniform(Policy()).sha256


def test_hash_follows_what_is_in_force() -> None:
    policies = parsed(LAYERS)
    reordered = yaml.safe_dump(yaml.safe_load(dedent(LAYERS)), sort_keys=True)
    assert parsed(f"# said otherwise\n{reordered}").sha256 == policies.sha256
    assert parsed(LAYERS.replace("idle_ms: 20", "idle_ms: 21")).sha256 != policies.sha256
    assert parsed(LAYERS.replace("plain", "other")).sha256 != policies.sha256


# A file without its first line, and every problem in it: line, field, part of the message. Line 1 is schema_version.
PROBLEMS: list[tuple[str, list[tuple[int, str, str]]]] = [
    ("defaults: {}", [(2, "defaults", "unknown field; known here: schema_version, default, routes, tenants")]),
    (
        "default:\n  treshold: 0.5\n  shadow: 'yes'\n  models: fedward\n  check_deadline_ms: 0.5",
        [
            (3, "default.treshold", "unknown field; known here: shadow, models, system_prompt"),
            (4, "default.shadow", "must be true or false; it is 'yes'"),
            (5, "default.models", "must be a list"),
            (6, "default.check_deadline_ms", "must be a valid integer; it is '0.5'"),
        ],
    ),
    (
        "tenants:\n  acme:\n    route: {}\n    prompt:\n  'a b': {}",
        [
            (4, "tenants.acme.route", "unknown field; known here: .*, routes$"),
            (5, "tenants.acme.prompt", "must be a mapping"),
            (6, "tenants.a b", "a tenant's name has 1 to 200 characters and no white space"),
        ],
    ),
    (
        "default:\n  prompt:\n    threshold: 1.5\n  response:\n    threshold: .nan\n    categories:\n"
        "      S1: {threshold: -0.1}\n      S2: {threshold: true}\n      S15: {threshold: 0.5}\n      S3: 0.4",
        [
            (4, "default.prompt.threshold", "must be less than or equal to 1; it is '1.5'"),
            (6, "default.response.threshold", "must be a finite number"),
            (8, "default.response.categories.S1.threshold", "must be greater than or equal to 0; it is '-0.1'"),
            (9, "default.response.categories.S2.threshold", "must be a valid number; it is 'True'"),
            (10, "default.response.categories.S15", "must be 'S1', 'S2', .* or 'S14'; it is 'S15'"),
            (11, "default.response.categories.S3", "must be a mapping"),
        ],
    ),
    (
        "routes:\n  chats: {}\n  chat:\n    stream:\n      unit: word\n      max_characters: 5",
        [
            (3, "routes.chats", "must be 'chat', 'completions', 'generate' or 'moderations'"),
            (6, "routes.chat.stream.unit", "must be 'sentence', 'characters' or 'answer'; it is 'word'"),
            (7, "routes.chat.stream.max_characters", "must be greater than or equal to 20; it is '5'"),
        ],
    ),
    (
        "default:\n  prompt:\n    action: revise\n    categories:\n      S1: {action: redact}\n"
        "  response: {action: block}",
        [
            (4, "default.prompt.action", "a prompt cannot be revised: .*; use refuse"),
            (6, "default.prompt.categories.S1.action", "a prompt cannot be redacted: .*; use refuse"),
            (7, "default.response.action", "must be refuse, revise or redact; it is 'block'"),
        ],
    ),
    (
        "default:\n  shadow: true\n  shadow: false\n  models: []\n  shadow: 3",
        [
            (4, "default.shadow", "given twice; first in line 3"),
            (5, "default.models", "must name at least one model"),
            (6, "default.shadow", "given twice; first in line 3"),
        ],
    ),
    (
        "default: &all\n  prompt: !!python/object/apply:os.system [ls]\n  models: [2024-01-01]\n  <<: {}\n"
        "routes:\n  chat: *all\ntenants:\n  no: {}\n  ? [a]\n  : {}",
        [
            (3, "default.prompt", "the tag !!python/object/apply:os.system is not read here"),
            (4, "default.models.0", "the tag !!timestamp is not read here; put text in quotes"),
            (5, "default", "merge keys (<<) are not read"),
            (7, "routes.chat", "aliases (*name) are not read"),
            (9, "tenants", "keys are text; put 'no' in quotes"),
            (10, "tenants", "keys are text, not lists or mappings"),
        ],
    ),
    (
        "default: !!map x\nroutes: !!int ''\ntenants: !!bool x",
        [
            (2, "default", "the tag !!map is not read here"),
            (3, "routes", "'' is no int"),
            (4, "tenants", "'x' is no bool"),
        ],
    ),
    ("default: [1\nroutes: {}", [(3, "", "not valid YAML: while parsing a flow sequence")]),
    ("a: {}\n--- \nb: {}", [(3, "", "not valid YAML: .*another document")]),
    (f"default: {'{a: ' * 1500}", [(1, "", "nested too deeply")]),
    ("x: '\x07'", [(1, "", "not valid YAML: unacceptable character")]),
]


@pytest.mark.parametrize(("text", "problems"), PROBLEMS)
def test_every_problem_is_told_with_its_line(text: str, problems: list[tuple[int, str, str]]) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(text)
    told = caught.value.message.splitlines()
    assert len(told) == len(problems), told
    for line, (number, field, message) in zip(told, problems, strict=True):
        place, _, rest = line.partition(f"policy.yaml:{number}: " + (f"{field}: " if field else ""))
        assert not place
        assert re.search(re.escape(message).replace(r"\.\*", ".*").replace(r"\$", "$"), rest), rest


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "policy.yaml:1: the file is empty"),
        (b"# only a remark\n", "policy.yaml:1: the file is empty"),
        (b"default: {}\n", "policy.yaml:1: schema_version: is missing"),
        (b"schema_version: 2\n", "policy.yaml:1: schema_version: must be 1; it is '2'"),
        (b"- a\n- b\n", "policy.yaml:1: must be a mapping"),
        (b"schema_version: 1\n# \xff\n", "policy.yaml:2: not UTF-8 text"),
        (b"#" * (LIMIT_BYTES + 1), f"policy.yaml:1: the file has {LIMIT_BYTES + 1} bytes; at most {LIMIT_BYTES}"),
    ],
)
def test_what_is_no_policy_at_all(raw: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_policies(raw, "policy.yaml")
    assert caught.value.message.startswith(message)


def test_aliases_that_multiply_are_refused_without_being_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    with pytest.raises(ConfigError, match="aliases"):
        parsed("\n".join(lines))


def test_milder_category_that_can_never_win_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("default:\n  response:\n    categories:\n      S6: {action: redact}")
    assert caught.value.message.startswith(
        "policy.yaml:5: default.response.categories.S6.action: redact never comes about: "
    )
    with pytest.raises(ConfigError, match=r"^policy.yaml:6: tenants.acme.response.categories.S6.action: revise never"):
        parsed("tenants:\n  acme:\n    response:\n      categories:\n        S6: {action: revise}")
    with pytest.raises(ConfigError, match=r"^policy.yaml:4: routes.chat.response.categories.S6.action: redact never"):
        parsed("routes:\n  chat:\n    response: {action: revise, categories: {S6: {action: redact}}}")


@pytest.mark.parametrize(
    "text",
    [
        "default:\n  response: {action: redact, categories: {S6: {action: revise}}}",
        "default:\n  response: {categories: {S6: {threshold: 0.5, action: redact}}}",
        "default:\n  response: {action: redact, categories: {S6: {action: revise}}}\n"
        "tenants:\n  strict:\n    response: {action: refuse}",
    ],
)
def test_category_that_can_win_or_that_a_stricter_layer_overrules_is_fine(text: str) -> None:
    parsed(text)


FIELDS = ["schema_version", "default", "routes", "tenants", "chat", "acme", "shadow", "models", "system_prompt"]
FIELDS += ["check_deadline_ms", "stream", "unit", "prompt", "response", "threshold", "action", "categories", "S1"]
plausible = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["refuse", "redact"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5),
    max_leaves=30,
)


def reads_or_refuses(raw: bytes) -> None:
    try:
        policies = parse_policies(raw, "policy.yaml")
    except ConfigError as error:
        unplaced = [line for line in error.message.split("\n") if not re.match(r"policy\.yaml:\d+: ", line)]
    else:
        unplaced = []
        policies.of("acme", Route.CHAT)
    assert not unplaced


@given(st.binary() | st.text().map(str.encode) | st.text("[]{}:,-&*!?|>'\"%@`#<0a. \n").map(str.encode))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    reads_or_refuses(raw)


@given(plausible)
def test_any_values_are_read_or_refused(content: Any) -> None:
    whole = {"schema_version": 1} | content if isinstance(content, dict) else content
    reads_or_refuses(yaml.safe_dump(whole).encode())


@given(st.integers(0), st.integers(0, 40), st.text("[]{}:,-&*!?|>'\"%@`#<0a. \n", max_size=5))
def test_any_damage_to_the_example_is_read_or_refused(at: int, length: int, text: str) -> None:
    raw = EXAMPLE.read_bytes()
    at %= len(raw)
    reads_or_refuses(raw[:at] + text.encode() + raw[at + length :])


# The file in force


def policy_text(deadline: int) -> str:
    return f"schema_version: 1\ndefault: {{check_deadline_ms: {deadline}}}\n"


def deadline_of(policies: WatchedFile[PolicySet]) -> int:
    return policies.current.of(None, Route.CHAT).check_deadline_ms


def look_until_settled(policies: WatchedFile[PolicySet]) -> None:
    policies.look()
    policies.look()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text(100))
    return path


def test_changed_file_comes_into_force_once_it_stays_the_same(file: Path) -> None:
    policies = WatchedFile(file, read_policies)
    file.write_text("schema_version: 1\n")  # as if half of it were written
    policies.look()
    assert deadline_of(policies) == 100
    file.write_text(policy_text(1234))
    policies.look()
    assert deadline_of(policies) == 100
    policies.look()
    assert deadline_of(policies) == 1234


def test_replaced_file_comes_into_force_even_with_the_old_time_and_size(file: Path) -> None:
    policies = WatchedFile(file, read_policies)
    new = file.with_name("new.yaml")
    new.write_text(policy_text(200))
    status = file.stat()
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(file)
    look_until_settled(policies)
    assert deadline_of(policies) == 200


def test_swapped_link_of_a_config_map_comes_into_force(tmp_path: Path) -> None:
    for number in (1, 2):
        folder = tmp_path / f"..revision_{number}"
        folder.mkdir()
        (folder / "policy.yaml").write_text(policy_text(number * 100))
    (tmp_path / "..data").symlink_to("..revision_1")
    (tmp_path / "policy.yaml").symlink_to("..data/policy.yaml")
    policies = WatchedFile(tmp_path / "policy.yaml", read_policies)
    assert deadline_of(policies) == 100

    (tmp_path / "..data_tmp").symlink_to("..revision_2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    look_until_settled(policies)
    assert deadline_of(policies) == 200


@pytest.mark.parametrize("broken", ["schema_version: 1\ndefault: {shadow: 3}\n", "", None])
def test_broken_file_leaves_the_old_policy_in_force_and_is_told_once(file: Path, broken: str | None) -> None:
    policies = WatchedFile(file, read_policies)
    before = policies.current
    file.unlink() if broken is None else file.write_text(broken)
    with structlog.testing.capture_logs() as logs:
        for _ in range(5):
            policies.look()
    assert policies.current is before
    assert policies.problem is not None
    assert str(file) in policies.problem
    assert [(log["log_level"], log["error"]) for log in logs] == [("error", policies.problem)]

    file.write_text(policy_text(300))
    look_until_settled(policies)
    assert deadline_of(policies) == 300
    assert policies.problem is None


def test_broken_file_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the policy: No such file"):
        WatchedFile(tmp_path / "none.yaml", read_policies)


REVISING = """\
schema_version: 1
default:
  response: {action: redact}
routes:
  chat:
    response: {categories: {S4: {threshold: 0.2, action: revise}}}
tenants:
  lab:
    response: {action: revise}
  trial:
    shadow: true
    response: {action: revise}
  strict:
    response: {action: refuse, categories: {S4: {action: refuse}}}
"""


def test_revisions_need_a_critique_service_where_they_are_carried_out() -> None:
    with pytest.raises(ConfigError) as error:
        parse_policies(REVISING.encode(), "p", can_revise=False)
    told = [line.split(": there is no critique service")[0] for line in error.value.message.splitlines()]
    assert told == ["p:6: routes.chat.response.categories.S4.action", "p:9: tenants.lab.response.action"]
    assert "--critique-url" in error.value.message
    assert parse_policies(REVISING.encode(), "p").of("lab", Route.CHAT).response.action is Action.REVISE
    harmless = REVISING.replace("action: revise", "action: redact")
    assert parse_policies(harmless.encode(), "p", can_revise=False)


def test_new_file_that_revises_without_a_critique_service_is_not_taken(file: Path) -> None:
    read = partial(read_policies, can_revise=False)
    policies = WatchedFile(file, read)
    file.write_text(REVISING)
    look_until_settled(policies)
    assert deadline_of(policies) == 100
    assert policies.problem is not None
    assert "there is no critique service" in policies.problem
    with pytest.raises(ConfigError, match="there is no critique service"):
        WatchedFile(file, read)


def test_watching_brings_a_new_file_into_force(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.watched_file, "LOOK_SECONDS", 0.01)

    policies = WatchedFile(file, read_policies)

    async def run() -> None:
        async with watching([policies]), asyncio.timeout(10):
            while deadline_of(policies) != 200:  # noqa: ASYNC110  # there is no event to wait for: a user only sees it
                await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    file.write_text(policy_text(200))
    asyncio.run(run())


# The command


def test_check_prints_what_is_in_force(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(EXAMPLE)]) == 0
    shown = capsys.readouterr().out
    assert read_policies(EXAMPLE).sha256 in shown
    for heading in ("everybody else, on chat, completions, moderations", "tenant clinic, on chat", "tenant trial, on "):
        assert f"\n{heading}" in shown


def test_check_shows_one_policy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(EXAMPLE), "--tenant", "clinic", "--route", "chat"]) == 0
    policy = read_policies(EXAMPLE).of("clinic", Route.CHAT)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "",
        "tenant clinic, on chat",
        f"  sha256         {policy.sha256}",
        "  mode           enforced",
        "  models         fedward*",
        "  system prompt  none",
        "  check          within 500 ms",
        "  stream         by sentence, 200 characters at most, 300 ms of pause",
        "  prompt         refuse if the classifier says unsafe",
        "    S4           refuse from 0.3 on (Child sexual exploitation)",
        "    S9           refuse from 0.5 on (Indiscriminate weapons)",
        "  response       redact if the classifier says unsafe",
        "    S1           refuse if found unsafe and likely (Violent crimes)",
        "    S2           refuse if found unsafe and likely (Non violent crimes)",
        "    S3           refuse if found unsafe and likely (Sex related crimes)",
        "    S4           refuse from 0.3 on (Child sexual exploitation)",
        "    S9           refuse from 0.5 on (Indiscriminate weapons)",
        "    S11          refuse if found unsafe and likely (Suicide and self harm)",
    ]


def test_check_names_a_tenant_that_the_file_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(EXAMPLE), "--tenant", "nobody", "--route", "chat"]) == 0
    assert "tenant nobody, which the file does not name, on chat" in capsys.readouterr().out


def test_check_fails_when_one_of_the_files_is_wrong(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("schema_version: 1\nrotues: {}\n")
    assert main(["policy", "check", str(file), str(EXAMPLE)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{file}:2: rotues: unknown field")
    assert f"{EXAMPLE}: good" in captured.out


def test_check_has_help_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["policy", "check", "--help"])
    assert caught.value.code == 0
    assert "python -m gateway policy check policy.yaml --tenant acme --route chat" in capsys.readouterr().out


# The manual


@pytest.mark.parametrize("model", [Policy, StreamPolicy, DirectionPolicy, CategoryPolicy])
def test_manual_has_every_field_with_its_default(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        prefix = {StreamPolicy: "stream.", DirectionPolicy: "prompt.", CategoryPolicy: "prompt.categories.<id>."}
        shown = yaml.safe_dump(model().model_dump(mode="json")[name], default_flow_style=True).split("\n")[0]
        cell = "" if isinstance(default, BaseModel | dict) else f"| `{shown}` |"
        if cell:
            assert re.search(rf"\| `{re.escape(prefix.get(model, '') + name)}`.*{re.escape(cell)}", MANUAL), name


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", MANUAL, flags=re.S))
def test_policies_in_the_manual_are_good(block: str) -> None:
    parse_policies(block.encode(), "policy.md")
