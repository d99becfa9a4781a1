"""Files that are written whole or not at all, and JSONL that names the line at fault."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from services.common.files import replace_file
from services.contracts.constitution import describe
from services.contracts.errors import DataError

Line = TypeVar("Line", bound=BaseModel)


def write_json(path: Path, value: BaseModel) -> None:
    """Write a model as indented JSON, atomically."""
    replace_file(path, (value.model_dump_json(indent=2) + "\n").encode())


def write_jsonl(path: Path, lines: Iterable[BaseModel]) -> None:
    """Write one model a line, atomically."""
    replace_file(path, "".join(line.model_dump_json() + "\n" for line in lines).encode())


def read_text(path: Path) -> str:
    """A file's text; raises DataError naming the file when it cannot be read or is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error


def read_json(path: Path, model: type[Line]) -> Line:
    """A JSON file as a model; raises DataError naming the file and the key at fault."""
    try:
        return model.model_validate_json(read_text(path))
    except ValidationError as error:
        raise DataError(f"{path}: {describe(error)}") from error


def read_jsonl(path: Path, model: type[Line], *, drop_partial_end: bool = False) -> list[Line]:
    """A JSONL file as models, one for each line.

    Args:
        path: the file.
        model: what a line holds.
        drop_partial_end: leave out a last line without a line end: its writer was killed in the middle of it.

    Raises:
        DataError: beginning with ``file:line`` of the first malformed line.
    """
    # Not splitlines(): that also breaks at separators that JSON allows inside a string.
    *lines, end = read_text(path).split("\n")
    if end and not drop_partial_end:
        lines.append(end)
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            found.append(model.model_validate_json(line))
        except ValidationError as error:
            raise DataError(f"{path}:{number}: {describe(error)}") from error
    return found
