"""Files written whole or not at all, and the log that a killed run leaves behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from evaluation.clients import Answer
from evaluation.datasets import PromptSet
from evaluation.files import read_jsonl, write_jsonl
from evaluation.samples import RunIdentity, SampleLog
from evaluation.scoring import Sample, score
from services.common.files import replace_file
from services.contracts.errors import ConfigError, DataError
from services.contracts.verdicts import Outcome, Verdict

IDENTITY = RunIdentity(
    model="m", judge_sha256="2" * 64, arm="none", round=1, max_tokens=32, sets={"advbench": "0" * 64}
)
PROMPTS = list(PromptSet("advbench", True, "test", tuple(f"forbidden thing {i}" for i in range(4))).prompts())
VERDICT = Verdict(outcome=Outcome.SAFE, score=0.1, refused=True, model_id="j")


class Line(BaseModel):
    number: int


def samples() -> list[Sample]:
    return [score(prompt, Answer("I'm sorry, I cannot help.", "stop"), VERDICT) for prompt in PROMPTS]


def test_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    write_jsonl(path, [Line(number=1)])

    def breaks_off() -> Iterator[Line]:
        yield Line(number=2)
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        write_jsonl(path, breaks_off())
    assert read_jsonl(path, Line) == [Line(number=1)]
    assert [p.name for p in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_folder_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        replace_file(tmp_path / "taken", b"text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_jsonl_keeps_line_separators_inside_strings(tmp_path: Path) -> None:
    class Text(BaseModel):
        text: str

    lines = [Text(text="one\u2028two\x85three\r\nfour"), Text(text="five")]
    write_jsonl(tmp_path / "t.jsonl", lines)
    assert read_jsonl(tmp_path / "t.jsonl", Text) == lines


def test_resumed_log_keeps_what_is_scored_and_drops_a_cut_off_line(tmp_path: Path) -> None:
    done = samples()
    failed = score(PROMPTS[2], Answer(None, error="HTTP 500"), None)
    log = SampleLog(tmp_path, IDENTITY)
    log.append([done[0], done[1]])
    log.append([failed])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(done[3].model_dump_json()[:40])
    resumed = SampleLog(tmp_path, IDENTITY)
    assert list(resumed.samples) == [PROMPTS[0].id, PROMPTS[1].id]
    resumed.append([done[3], done[2]])
    assert resumed.finish(p.id for p in PROMPTS) == done
    assert read_jsonl(tmp_path / "samples.jsonl", Sample) == done


def test_malformed_line_in_the_middle_is_named(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, IDENTITY)
    log.append(samples()[:1])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:2: "):
        SampleLog(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"model": "other"}, "model was 'm', is 'other'"),
        ({"sets": {"advbench": "f" * 64}}, "sets was"),
        ({"round": 2}, "round was 1, is 2"),
        ({"judge_sha256": "3" * 64}, "judge_sha256 was"),
    ],
)
def test_folder_of_another_evaluation_is_left_alone(tmp_path: Path, change: dict[str, object], fault: str) -> None:
    SampleLog(tmp_path, IDENTITY).append(samples())
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=fault):
        SampleLog(tmp_path, IDENTITY.model_copy(update=change))
    assert (tmp_path / "samples.jsonl").read_bytes() == before
