"""The command that runs federations in one process, and the attack that it offers."""

import json
from pathlib import Path

import numpy as np
import pytest

from services.contracts.errors import ConfigError
from tests.fakes.tiny_model import build_tiny_model
from tests.fakes.trainer_runs import ROOT, small_run
from trainer.aggregation import Arrays
from trainer.in_process import main
from trainer.registry import read_adapter


def run(folder: Path, model: Path, *flags: str) -> tuple[Arrays, Arrays]:
    """Run a federation of one client for a round; returns the adapters before and after."""
    folder.mkdir()
    config = small_run(folder, model, rounds=1, num_clients=1, clients_per_round=1, min_clients=1)
    values = {
        key: "" if value is None else value for key, value in config.model_dump(mode="json", by_alias=True).items()
    }
    file = folder / "run.toml"
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
    assert main([str(file), "--app", str(ROOT), *flags]) == 0
    before, after = (read_adapter(config.run_dir / "adapters" / f"round-{number}")[0] for number in (0, 1))
    return before, after


def test_boosted_client_sends_a_multiple_of_its_change(tmp_path: Path) -> None:
    model = build_tiny_model(tmp_path / "model")
    start, plain = run(tmp_path / "plain", model)
    _, boosted = run(tmp_path / "boosted", model, "--boost", "0=3")
    assert any((plain[name] != start[name]).any() for name in start)
    for name in start:
        np.testing.assert_allclose(boosted[name] - start[name], 3 * (plain[name] - start[name]), atol=1e-6)


def test_error_of_a_run_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.toml"), "--app", str(ROOT)]) == ConfigError.exit_code
    assert "none.toml: cannot be read" in capsys.readouterr().err


def test_malformed_boost_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a.toml", "--boost", "first=5"])
    assert "argument --boost: 'first=5' is not CLIENT=FACTOR" in capsys.readouterr().err
