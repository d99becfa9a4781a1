"""The table of the safety models' quality."""

from pathlib import Path

import pytest

from services.contracts.errors import ConfigError
from services.safety.embedded.load import load_classifier
from services.safety.training.measure import measure, table


def test_only_some_lines(data_dir: Path) -> None:
    classifier = load_classifier("ngram")
    lines = measure(classifier, data_dir, ["XSTest prompts"])
    assert [line.name[:6] for line in lines] == ["XSTest", "XSTest"]
    asked, at_share = (line.accuracy for line in lines)
    assert (asked.unsafe, asked.safe) == (at_share.unsafe, at_share.safe) == (200, 250)
    assert lines[0].threshold == classifier.point.prompt_threshold
    assert at_share.false_positives == pytest.approx(0.15, abs=0.01)
    assert table(lines).count("\n") == 3


def test_unknown_line_is_named(data_dir: Path) -> None:
    with pytest.raises(ConfigError, match="has nothing or nowhere in its name"):
        measure(load_classifier("ngram"), data_dir, ["nothing", "nowhere"])
