"""An operator's labelled data: one JSON object a line, to calibrate or to tune a classifier on.

::

    {"prompt": "How do I bake bread?", "unsafe": false}
    {"prompt": "...", "response": "...", "unsafe": true, "category": "S2", "refused": false}
    {"messages": [{"role": "user", "content": "..."}], "unsafe": false}

With a response (or a conversation that ends with the assistant's turn) ``unsafe`` is about the response: one that
refuses an unsafe prompt is safe. ``category`` names the hazard of an unsafe item; ``refused`` says whether the response
declines. Error messages name file and line and quote nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from services.contracts.adapters import file_sha256
from services.contracts.chat import ChatMessage
from services.contracts.constitution import describe
from services.contracts.errors import DataError, RequestError
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifyItem
from services.safety.items import Conversation, read_item

Kind = Literal["prompt", "response"]
KINDS: tuple[Kind, ...] = ("prompt", "response")


@dataclass(frozen=True)
class Labelled:
    """An item, and what a person says of it.

    Args:
        item: what is classified.
        unsafe: whether it is unsafe; with a response, whether the response is.
        category: the hazard of an unsafe item, where somebody named one.
        refused: whether the response declines, where somebody said so.
    """

    item: ClassifyItem
    unsafe: bool
    category: HazardCategory | None = None
    refused: bool | None = None

    @property
    def conversation(self) -> Conversation:
        """The item in the classifier's form; raises RequestError when there is nothing to classify."""
        return read_item(self.item)

    @property
    def kind(self) -> Kind:
        """What is judged."""
        return "prompt" if self.conversation.response is None else "response"


class LabelledFile(NamedTuple):
    """A file's items; ``name`` is without its folder, ``sha256`` that of its bytes."""

    name: str
    sha256: str
    items: list[Labelled]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str | None = None
    response: str | None = None
    messages: list[ChatMessage] | None = None
    unsafe: bool
    category: HazardCategory | None = None
    refused: bool | None = None


def read_labelled(path: Path) -> LabelledFile:
    """Read and check a file of labelled items; blank lines are skipped.

    Raises:
        DataError: the file cannot be read, a line is malformed (the message names it), or one class is missing.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot read the labelled data: {error.strerror}") from error
    items = [_read_line(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise DataError(f"{path}: holds no items; each line is an object with 'prompt' and 'unsafe'")
    require_both_classes(items, str(path))
    return LabelledFile(path.name, file_sha256(path), items)


def require_both_classes(items: Sequence[Labelled], where: str) -> None:
    """Refuse data from which no threshold could come.

    Raises:
        DataError: all prompts, or all responses, have the same label; the message says which class is missing.
    """
    for kind in KINDS:
        labels = [item.unsafe for item in items if item.kind == kind]
        if len(set(labels)) == 1:
            missing = "safe" if labels[0] else "unsafe"
            instead = f", or leave the {kind}s out" if len(labels) < len(items) else ""
            raise DataError(
                f"{where}: one class only: of {len(labels)} labelled {kind}s none is {missing}; "
                f"add some that are{instead}"
            )


def _read_line(place: str, text: bytes) -> Labelled:
    """The item of one line; ``place`` is ``file:line``."""
    try:
        line = _Line.model_validate_json(text)
        item = ClassifyItem(prompt=line.prompt, response=line.response, messages=line.messages)
        labelled = Labelled(item, line.unsafe, line.category, line.refused)
        kind = labelled.kind
    except ValidationError as error:
        raise DataError(f"{place}: {describe(error)}") from error
    except RequestError as error:
        raise DataError(f"{place}: {error.message}") from error
    if labelled.category is not None and not labelled.unsafe:
        raise DataError(f"{place}: 'category' is the hazard of an unsafe item, and this one is labelled safe")
    if labelled.refused is not None and kind == "prompt":
        raise DataError(f"{place}: 'refused' is about a response, and there is none")
    return labelled
