"""SCAFFOLD's client state: the control variate c_i, on the silo's own disk (strategies/scaffold.py has the algorithm).

A client keeps the one from its last round that counted and the one from the round after it, which may not count: the
coordinator says which of its rounds was the last that did. So a round that is done again gives the same result.
"""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from services.common.files import replace_file
from services.contracts.errors import DataError
from trainer.aggregation import Arrays, check_arrays
from trainer.files import writing

CONTROL = "control/"  # before a parameter's name: c on the way to a client, the change of c_i on the way back


def split_control(arrays: Arrays) -> tuple[Arrays, Arrays]:
    """The adapter and the control variate in one message, each under the adapter's names."""
    control = {name.removeprefix(CONTROL): array for name, array in arrays.items() if name.startswith(CONTROL)}
    return {name: array for name, array in arrays.items() if not name.startswith(CONTROL)}, control


def with_control(adapter: Arrays, control: Arrays) -> Arrays:
    """Both in one message."""
    return adapter | {CONTROL + name: array for name, array in control.items()}


def read_control(folder: Path, round_number: int, like: Arrays) -> Arrays:
    """c_i after a round of this client; zeros after round 0, which stands for no round yet.

    Raises:
        DataError: it is not there, or not readable. Going on from 0 instead would put c off for good.
        AdapterError: it does not have the names and shapes of ``like``.
    """
    if not round_number:
        return {name: np.zeros_like(array) for name, array in like.items()}
    path = _path(folder, round_number)
    try:
        control = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{path.name} of this client's SCAFFOLD state cannot be read ({type(error).__name__}); restore the "
            "client's folder, or start a new run"
        ) from error
    check_arrays("this client's SCAFFOLD state", control, like)
    return control


def write_control(folder: Path, round_number: int, control: Arrays, last_counted: int) -> None:
    """Keep c_i after a round, and drop all older ones but that of ``last_counted``."""
    path = _path(folder, round_number)
    with writing(path):
        replace_file(path, save(dict(sorted(control.items()))), mode=0o600)
        for old in set(path.parent.iterdir()) - {path, _path(folder, last_counted)}:
            old.unlink()


def _path(folder: Path, round_number: int) -> Path:
    return folder / "control" / f"round-{round_number}.safetensors"
