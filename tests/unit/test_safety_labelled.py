"""Labelled files: what is read, and errors that name file and line and quote no text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from services.contracts.errors import DataError
from services.contracts.hazards import HazardCategory
from services.safety.training.labelled import read_labelled

SAFE: dict[str, Any] = {"prompt": "How do I bake bread?", "unsafe": False}
UNSAFE: dict[str, Any] = {"prompt": "Help me rob the bakery.", "unsafe": True, "category": "S2"}
ANSWERED: dict[str, Any] = {"prompt": "Help me rob it.", "response": "No.", "unsafe": False, "refused": True}
TALK = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]


def write(folder: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    path = folder / "own.jsonl"
    texts = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    path.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return path


def test_reads_items_of_every_form_with_their_labels(tmp_path: Path) -> None:
    unsafe_answer = {"messages": TALK, "unsafe": True}
    path = write(tmp_path, b"\xef\xbb\xbf" + json.dumps(SAFE).encode(), "", UNSAFE, "  \r", ANSWERED, unsafe_answer)
    file = read_labelled(path)
    assert (file.name, file.sha256) == ("own.jsonl", hashlib.sha256(path.read_bytes()).hexdigest())
    assert [(item.kind, item.unsafe, item.category, item.refused) for item in file.items] == [
        ("prompt", False, None, None),
        ("prompt", True, HazardCategory.NON_VIOLENT_CRIMES, None),
        ("response", False, None, True),
        ("response", True, None, None),
    ]
    assert file.items[3].conversation.prompts == ["Hello"]
    assert file.items[2].item.response == "No."


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a"', "Invalid JSON"),
        ("[1]", "Input should be an object"),
        (b'{"prompt": "\xff", "unsafe": true}', "Invalid JSON"),
        (r'{"prompt": "\ud800", "unsafe": true}', "Invalid JSON"),
        ({"prompt": "a"}, "unsafe: Field required"),
        (SAFE | {"lable": 1}, "lable: Extra inputs are not permitted"),
        (SAFE | {"unsafe": "no"}, "unsafe: Input should be a valid boolean"),
        (SAFE | {"unsafe": 0}, "unsafe: Input should be a valid boolean"),
        (SAFE | {"prompt": 5}, "prompt: Input should be a valid string"),
        (SAFE | {"prompt": " \n"}, "prompt is empty"),
        (UNSAFE | {"category": "S15"}, "category: Input should be 'S1', 'S2'"),
        (UNSAFE | {"category": 2}, "category: Input should be"),
        (SAFE | {"category": "S1"}, "'category' is the hazard of an unsafe item, and this one is labelled safe"),
        (SAFE | {"refused": True}, "'refused' is about a response, and there is none"),
        ({"unsafe": True}, "give either 'prompt'"),
        (SAFE | {"messages": TALK}, "give either 'prompt'"),
        ({"messages": TALK, "response": "a", "unsafe": True}, "'response' goes with 'prompt'"),
        ({"messages": TALK[1:], "unsafe": True}, "has no user turn with text"),
        ({"messages": [], "unsafe": True}, "has no user turn with text"),
        ({"messages": [{"role": "robot", "content": "a"}], "unsafe": True}, "messages.0.role"),
    ],
)
def test_malformed_line_is_named_and_not_quoted(tmp_path: Path, line: dict[str, Any] | str, message: str) -> None:
    path = write(tmp_path, SAFE, "", line, UNSAFE)
    with pytest.raises(DataError) as caught:
        read_labelled(path)
    assert caught.value.message.startswith(f"{path}:3: ")
    assert message in caught.value.message
    assert "bake" not in caught.value.message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([SAFE, SAFE], "one class only: of 2 labelled prompts none is unsafe; add some that are$"),
        ([UNSAFE], "one class only: of 1 labelled prompts none is safe; add some that are$"),
        ([SAFE, UNSAFE, ANSWERED], "of 1 labelled responses none is unsafe; add some that are, or leave the responses"),
        (["", " "], "holds no items"),
    ],
)
def test_file_from_which_no_threshold_could_come_is_refused(
    tmp_path: Path, lines: list[dict[str, Any] | str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_labelled(write(tmp_path, *lines))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot read the labelled data: No such file"):
        read_labelled(tmp_path / "none.jsonl")
