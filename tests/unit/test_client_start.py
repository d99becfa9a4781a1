"""What a client's process loads, and when: in Flower's deployment runtime each message has a process of its own."""

import subprocess
import sys

from tests.fakes.trainer_runs import ROOT
from trainer.client_app import TRAINING

# Libraries that are there in a full installation and take long to load, but that no client needs.
NEEDLESS = {"ray", "datasets", "sklearn", "pandas", "matplotlib", "onnxruntime", "fastapi.testclient", "trl", "IPython"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_query_needs_no_training_library() -> None:
    loaded = run("import sys, trainer.client_app; print(*sys.modules)").split()
    assert not {"torch", "transformers", "peft", "scipy", TRAINING} & set(loaded)
    assert not NEEDLESS & set(loaded)


def test_training_loads_no_more_than_it_needs_and_leaves_the_collector_on() -> None:
    code = """
import gc, sys
from trainer import client_app
client_app.load_libraries()
assert gc.isenabled() and gc.get_freeze_count() > 100_000, gc.get_freeze_count()
frozen = gc.get_freeze_count()
client_app.load_libraries()
assert gc.get_freeze_count() <= frozen  # a second call freezes nothing more
print(*sys.modules)
"""
    loaded = set(run(code).split())
    assert {"torch", "transformers", "peft", TRAINING} <= loaded
    assert not NEEDLESS & loaded


def test_collector_is_on_again_when_a_library_is_missing() -> None:
    code = """
import gc, sys
from trainer import client_app
sys.modules["peft"] = None
try:
    client_app.load_libraries()
except ImportError:
    print(gc.isenabled())
"""
    assert run(code).split() == ["True"]
