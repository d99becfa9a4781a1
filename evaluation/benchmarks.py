"""Third-party benchmark files: where they lie under ``FEDWARD_DATA``, and the exact version that is meant.

None of their text is part of this project. A file whose sha256 differs is refused, since a figure on another version
is another figure; a user's own version can be evaluated as a JSONL file of its own.
"""

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from services.contracts.errors import DataError


class Benchmark(NamedTuple):
    """A file relative to ``FEDWARD_DATA``, with the sha256 of the version that is read."""

    path: str
    sha256: str


ADVBENCH = Benchmark(
    "advbench/harmful_behaviors.csv", "5c9d87515c4d431c3614f25a0af7a462eabdfa6035aa35d746e64159823836e3"
)
XSTEST = Benchmark("xstest/xstest_prompts.csv", "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a")
DO_NOT_ANSWER = Benchmark(
    "do_not_answer/data_en.csv", "410449674780aa7304512043706f7981f666a79528d11546da34ebdd9595681c"
)
DOLLY = Benchmark("dolly/dolly_3k.json", "cb8d16e85ec217a53587c96596a1e8971b8d72a2fd9d5bc23a2dd3d57b59eeea")
ALPACA = Benchmark("alpaca/alpaca.json", "c4ce1bdc5c9b92caabcb171c27c7ec1e79832836bae10291d7c8ab8c6245f600")
PURPLELLAMA_FRR = Benchmark(
    "purplellama/mitre_frr.json", "7a9b400bdf5ddbb36d5e7c3e8f6b5adb5d13125b8d03be66fd252a0f20b79d15"
)
XSTEST_ANSWERS = {
    model: Benchmark(f"xstest/xstest_v2_completions_{model}.csv", sha256)
    for model, sha256 in (
        ("gpt4", "71af323af8ecdec0efae23992317721441d2cfedddedeef3248f842f4e15c9ca"),
        ("llama2new", "6365cc55ce0a593c7ab8785853d02784be027d97199d4077912b4313cd010099"),
        ("llama2orig", "cbc52550e8ba8197a3e3d97a5af078d27bae4766737cd62df80270126a87ffc6"),
        ("mistralguard", "0ac03817b65e019a8f5b4b3eed805086f9f7fafe538ac9ebd156f80210af6903"),
        ("mistralinstruct", "6a146b65a5b96ec8249729bc2db459697175125998d7cbbcc88f7688ecf31dad"),
    )
}


def read_pinned(data: Path, benchmark: Benchmark) -> str:
    """The benchmark file's text.

    Raises:
        DataError: the file is missing, or is not the pinned version.
    """
    path = data / benchmark.path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read it: {error.strerror}; is this the folder of benchmarks?") from error
    found = hashlib.sha256(content).hexdigest()
    if found != benchmark.sha256:
        raise DataError(
            f"{path}: sha256 is {found}, but the version that is evaluated has {benchmark.sha256}; "
            "get that version, or give your own prompts as a JSONL file"
        )
    return content.decode("utf-8")


def read_csv(data: Path, benchmark: Benchmark) -> list[dict[str, str]]:
    """The rows of a CSV benchmark by column name; raises DataError as :func:`read_pinned` does."""
    return list(csv.DictReader(io.StringIO(read_pinned(data, benchmark), newline="")))


def read_rows(data: Path, benchmark: Benchmark) -> list[dict[str, Any]]:
    """The rows of a JSON benchmark, which is a list of objects; raises DataError as :func:`read_pinned` does."""
    rows: list[dict[str, Any]] = json.loads(read_pinned(data, benchmark))
    return rows
