"""Where prompts come from: built-in sets, benchmarks and the user's own files."""

from pathlib import Path

import pytest

from evaluation.benchmarks import DOLLY
from evaluation.datasets import DEFAULT_SETS, load_sets, read_prompt_file
from evaluation.split import find_clusters
from evaluation.text_rules import content_words
from services.contracts.errors import ConfigError, DataError


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def test_without_data_the_built_in_sets_stand_in_and_say_so() -> None:
    sets = load_sets(DEFAULT_SETS, data=None)
    assert [s.name for s in sets] == list(DEFAULT_SETS)
    assert [s.harmful for s in sets] == [True, False, False]
    for found in sets:
        assert len(found.texts) >= 60
        assert len(set(found.texts)) == len(found.texts)
        assert found.source.startswith("built-in")
        assert "FEDWARD_DATA is not set" in found.source
    ids = [prompt.id for s in sets for prompt in s.prompts()]
    assert len(set(ids)) == len(ids)


def test_built_in_prompts_are_varied_and_not_filled_in_templates() -> None:
    for found in load_sets(DEFAULT_SETS, data=None):
        largest = max(len(cluster) for cluster in find_clusters(found.texts))
        assert largest <= 3
        openings = [" ".join(text.split()[:4]).lower() for text in found.texts]
        assert max(openings.count(opening) for opening in openings) <= max(4, len(openings) // 30)


def test_limit_cuts_and_changes_the_hash() -> None:
    (whole,) = load_sets(["benign_alarming"], data=None)
    (cut,) = load_sets(["benign_alarming"], data=None, limit=5)
    assert cut.texts == whole.texts[:5]
    assert cut.sha256 != whole.sha256
    assert load_sets(["benign_alarming"], data=None)[0].sha256 == whole.sha256


def test_own_file_is_a_set_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", '{"prompt": "What is rain?", "harmful": false, "note": "kept out"}')
    (found,) = load_sets([str(path)], data=None)
    assert (found.name, found.harmful, found.source, found.texts) == (
        "mine",
        False,
        "file mine.jsonl",
        ("What is rain?",),
    )


def test_heldout_file_is_the_set_advbench(tmp_path: Path) -> None:
    path = write(tmp_path / "held.jsonl", '{"prompt": "something forbidden", "harmful": true}')
    (found,) = load_sets(["advbench"], data=None, heldout=path)
    assert (found.name, found.harmful, found.texts) == ("advbench", True, ("something forbidden",))


def test_benign_heldout_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "held.jsonl", '{"prompt": "What is rain?", "harmful": false}')
    with pytest.raises(DataError, match="--heldout must hold harmful prompts"):
        load_sets(["advbench"], data=None, heldout=path)


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ([], r"mine\.jsonl:1: the file holds no prompt"),
        (['{"prompt": "a b c", "harmful": false}', "{"], r"mine\.jsonl:2: "),
        (['{"prompt": "a b c"}'], r"mine\.jsonl:1: harmful: Field required"),
        (['{"prompt": "", "harmful": true}'], r"mine\.jsonl:1: prompt: "),
        (['{"prompt": "a", "harmful": true}', "", '{"prompt": "b", "harmful": true}'], r"mine\.jsonl:2: "),
        (
            ['{"prompt": "a", "harmful": true}', '{"prompt": "b", "harmful": false}'],
            r"mine\.jsonl:2: harmful and benign",
        ),
        (["[1, 2]"], r"mine\.jsonl:1: "),
    ],
)
def test_malformed_file_is_named_with_its_line(tmp_path: Path, lines: list[str], fault: str) -> None:
    path = write(tmp_path / "mine.jsonl", *lines)
    with pytest.raises(DataError, match=fault):
        read_prompt_file("mine", path)


def test_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"mine\.jsonl: not UTF-8"):
        read_prompt_file("mine", path)
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot read it: No such file"):
        read_prompt_file("gone", tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    ("names", "fault"),
    [
        (["advbnch"], "unknown set 'advbnch'; known: advbench, benign_out_of_source"),
        (["alpaca"], "alpaca needs the benchmarks; set FEDWARD_DATA"),
        (["advbench", "advbench"], "advbench is given more than once"),
        (["elsewhere/advbench.jsonl"], "has the name of a known set"),
    ],
)
def test_bad_set_names_are_refused(names: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        load_sets(names, data=None)


def test_another_version_of_a_benchmark_is_refused(tmp_path: Path) -> None:
    path = tmp_path / DOLLY.path
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(DataError, match=r"dolly_3k\.json: sha256 is "):
        load_sets(["benign_out_of_source"], data=tmp_path)


def test_benchmark_sets_have_their_sizes(data_dir: Path) -> None:
    names = [*DEFAULT_SETS, "xstest_unsafe", "do_not_answer", "alpaca", "purplellama_frr"]
    sets = {s.name: s for s in load_sets(names, data=data_dir)}
    assert {name: len(s.texts) for name, s in sets.items()} == {
        "advbench": 260,
        "benign_out_of_source": 150,
        "benign_alarming": 150,
        "xstest_unsafe": 200,
        "do_not_answer": 939,
        "alpaca": 150,
        "purplellama_frr": 750,
    }
    assert [name for name, s in sets.items() if s.harmful] == ["advbench", "xstest_unsafe", "do_not_answer"]
    for text in sets["benign_out_of_source"].texts:
        assert len(text) <= 160
        assert "\n" not in text
        assert len(content_words(text)) > 1
    again = {s.name: s.sha256 for s in load_sets(names, data=data_dir)}
    assert again == {name: s.sha256 for name, s in sets.items()}


def test_built_in_prompts_are_not_taken_from_the_benchmarks(data_dir: Path) -> None:
    names = [*DEFAULT_SETS, "xstest_unsafe", "do_not_answer", "alpaca"]
    theirs = [content_words(text) for s in load_sets(names, data=data_dir) for text in s.texts]
    for found in load_sets(DEFAULT_SETS, data=None):
        for text in found.texts:
            ours = content_words(text)
            assert all(len(ours & other) / len(ours | other) < 0.7 for other in theirs if other | ours), text
