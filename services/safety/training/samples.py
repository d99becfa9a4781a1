"""The encoder's training table: every text once, with a label for each head that it can teach."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from services.contracts.hazards import HazardCategory
from services.safety.training.answers import Answer
from services.safety.training.rows import Row
from services.safety.training.sources import at_most

# Most texts of each source. Templates of our own repeat themselves, and a large source must not dominate. A source
# that is not named here is taken whole.
MOST = {
    "own_acts": 6000,
    "own_artifacts": 2500,
    "own_crossings": 2500,
    "own_subjects": 2000,
    "own_tasks": 1500,
    "own_passages": 2500,
    "aart": 1000,
    "davidson": 2400,
    "toxigen": 3000,
    "hh_rlhf": 2500,
    "own_answers": 5000,
    "gsm8k": 800,
    "answers_aart": 600,
    "answers_harmfulqa": 1000,
}


@dataclass(frozen=True)
class Sample:
    """One text and what is known of it; None where a head learns nothing from it.

    Args:
        text: the text itself.
        asks: whether it is a prompt that asks for harm.
        harmful: whether it is harmful in itself, as an answer or a statement.
        declines: whether it is an answer that refuses.
        category: its hazard category, where its source names one.
        source: the data set or word list that it comes from.
        weight: how much it counts.
        group: rows of one group never stand on both sides of a split.
    """

    text: str
    asks: bool | None
    harmful: bool | None
    declines: bool | None
    category: HazardCategory | None
    source: str
    weight: float
    group: str

    @property
    def harmless(self) -> bool:
        """Whether nothing that is known of it is harm: such a text belongs to no hazard category."""
        return not self.asks and not self.harmful


def training_samples(rows: Iterable[Row], answers: Iterable[Answer]) -> list[Sample]:
    """Prompts and answers as one table; a text that stands in both teaches both kinds of heads at once.

    The opening turns of hh-rlhf are attempts to provoke harm, not prompts that somebody called harmful, and many are
    ordinary. They are left out here: an encoder learns such noise as words to be afraid of.
    """
    prompts = [row for row in rows if not (row.source == "hh_rlhf" and row.unsafe)]
    table: dict[str, Sample] = {}
    for row in _capped(prompts):
        table[row.text] = Sample(row.text, row.unsafe, None, None, row.category, row.source, row.weight, row.key)
    by_row = {answer.content_row(): answer for answer in answers}
    for row in _capped(by_row):
        answer, known = by_row[row], table.get(row.text)
        sample = known or Sample(answer.text, None, None, None, None, answer.source, answer.weight, answer.key)
        table[row.text] = replace(sample, harmful=answer.unsafe, declines=answer.refused)
    return list(table.values())


def _capped(rows: Iterable[Row]) -> list[Row]:
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return [row for source, of_source in by_source.items() for row in at_most(of_source, MOST.get(source, 10**9))]
