"""The import rules of docs/architecture.md, checked by reading every module's imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("services", "trainer", "gateway", "evaluation", "stack", "models")
HEAVY = {"torch", "transformers", "peft"}

# For each component, what it may import of ours. The first prefix that fits a module counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "services.contracts": ("services.contracts",),
    "services.common": ("services.common", "services.contracts"),
    "services.safety": ("services.safety", "services.common", "services.contracts"),
    "services.critique": ("services.critique", "services.common", "services.contracts", "models"),
    "services.inference": ("services.inference", "services.common", "services.contracts", "models"),
    "gateway": ("gateway", "services.common", "services.contracts"),
    "trainer": ("trainer", "services.common", "services.contracts", "models"),
    "evaluation": ("evaluation", "services.common", "services.contracts"),
    "stack": ("stack", "services.common", "services.contracts"),
    "models": (),
}
# Where torch may be although the component is otherwise without it: training, and guard models run in the process.
TORCH = (
    "services.safety.training.encoder",
    "services.safety.training.train",
    "services.safety.training.tune",
    "services.safety.training.bench",
    "services.safety.guard.local",
)
# Where Flower may be.
FLOWER = (
    "trainer.server_app", "trainer.client_app", "trainer.exchange", "trainer.in_process", "trainer.strategies",
    "trainer.bench", "trainer.privacy",
)  # fmt: skip
NO_TORCH = ("services.contracts", "services.common", "services.safety", "gateway", "evaluation", "stack")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def modules() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every absolute module that a file imports, at top level or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found.add(node.module or "")
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_module_imports_only_its_layer(path: Path) -> None:
    name = module_name(path)
    component = next((c for c in ALLOWED if within(name, c)), None)
    if component is None:
        assert name == "services"
        return
    ours = {i for i in imports(path) if i.split(".")[0] in PACKAGES}
    foreign = {i for i in ours if not any(within(i, allowed) for allowed in ALLOWED[component])}
    assert not foreign, f"{name} imports {sorted(foreign)}, which its layer must not"


@pytest.mark.parametrize("path", modules(), ids=module_name)
def test_library_stays_in_its_place(path: Path) -> None:
    name = module_name(path)
    roots = {i.split(".")[0] for i in imports(path)}
    if name not in TORCH and any(within(name, c) for c in NO_TORCH):
        assert not roots & HEAVY
    if not any(within(name, place) for place in FLOWER):
        assert "flwr" not in roots, f"{name} imports flwr; only {', '.join(FLOWER)} may"
    if "fastapi" in roots:
        assert name.endswith(".app") or within(name, "services.common"), f"{name} imports fastapi"
    if within(name, "services.contracts"):
        assert roots <= {*sys.stdlib_module_names, "pydantic", "services"}


def test_contracts_stay_small() -> None:
    assert len(list((ROOT / "services/contracts").glob("*.py"))) <= 10


LIGHT = ["gateway.app", "evaluation.run", "services.safety.app", "stack.demo", "trainer.client_app"]


@pytest.mark.parametrize("package", LIGHT)
def test_light_process_loads_no_torch(package: str) -> None:
    code = f"import sys, {package}; sys.exit(', '.join(sorted({HEAVY!r} & set(sys.modules))) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, f"importing {package} loads {done.stderr}"
