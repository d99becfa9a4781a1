"""Writing TOML files of plain values, which the trainer and Flower read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Value = str | int | float | bool


def write_toml(path: Path, values: Mapping[str, Value | Sequence[str]]) -> Path:
    """Write keys and values; returns the path."""
    # JSON's scalars and lists of text are TOML's, but for its surrogate pairs.
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    return path
