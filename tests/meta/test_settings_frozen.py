"""Every model of settings is frozen, and refuses a key that it does not know by the key's name."""

import ast
import importlib

import pytest
from pydantic import BaseModel, ValidationError

from services.common.settings import Settings, load_settings
from services.contracts.errors import ConfigError
from tests.meta.test_import_layers import ROOT, module_name, modules
from trainer.config import default_run_config, parse_run_config

ENDINGS = ("Settings", "Config", "Options", "Plan", "Bounds", "Recipe")
UNKNOWN = "no_such_key"


def settings_classes() -> dict[str, tuple[str, ast.ClassDef]]:
    """The classes of the project whose names say that they hold settings, with their modules."""
    return {
        node.name: (module_name(path), node)
        for path in modules()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef) and node.name.endswith(ENDINGS)
    }


def is_plain(node: ast.ClassDef) -> bool:
    """Whether it is no pydantic model but a dataclass or a NamedTuple, which is not imported: it may need torch."""
    return bool(node.decorator_list) or [ast.unparse(base) for base in node.bases] == ["NamedTuple"]


CLASSES = settings_classes()
PLAIN = {name: node for name, (_, node) in CLASSES.items() if is_plain(node)}
MODELS: list[type[BaseModel]] = [
    getattr(importlib.import_module(module), name) for name, (module, _) in CLASSES.items() if name not in PLAIN
]
PROCESSES = [cls for cls in MODELS if issubclass(cls, Settings) and cls is not Settings]


def test_the_known_settings_are_among_them() -> None:
    assert {cls.__name__ for cls in PROCESSES} == {
        "GatewaySettings", "SafetySettings", "CritiqueSettings", "InferenceSettings"
    }  # fmt: skip
    assert {"RunConfig", "RunOptions"} <= {cls.__name__ for cls in MODELS}
    assert {"DemoPlan", "GateBounds", "LoraSettings", "Recipe"} <= PLAIN.keys()


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_model_is_frozen(cls: type[BaseModel]) -> None:
    instance = cls.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(instance, next(iter(cls.model_fields)), "changed")


@pytest.mark.parametrize("name", PLAIN)
def test_dataclass_is_frozen(name: str) -> None:
    decorators = [ast.unparse(decorator) for decorator in PLAIN[name].decorator_list]
    assert decorators in ([], ["dataclass(frozen=True)"]), f"{name} has to be frozen"


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_model_refuses_an_unknown_key_by_its_name(cls: type[BaseModel]) -> None:
    with pytest.raises(ValidationError) as caught:
        cls.model_validate({UNKNOWN: "1"})
    refused = [error["loc"] for error in caught.value.errors() if error["type"] == "extra_forbidden"]
    assert refused == [(UNKNOWN,)]


@pytest.mark.parametrize("cls", PROCESSES, ids=lambda cls: cls.__name__)
def test_process_refuses_an_unknown_flag_by_its_name(cls: type[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings(cls, "python -m this", "", ["--no-such-flag", "1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("cls", PROCESSES, ids=lambda cls: cls.__name__)
def test_process_refuses_an_unknown_variable_by_its_name(cls: type[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    variable = f"{cls.model_config['env_prefix']}NO_SUCH_KEY"
    assert variable.startswith("FEDWARD_")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=f"unknown environment variable {variable}; known: "):
        load_settings(cls, "python -m this", "", [])


def test_run_configuration_refuses_an_unknown_key_by_its_name() -> None:
    with pytest.raises(ConfigError, match="unknown run-config key 'no-such-key'"):
        parse_run_config(default_run_config(ROOT / "pyproject.toml") | {"no-such-key": "1"})
