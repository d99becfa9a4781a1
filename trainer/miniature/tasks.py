"""Training examples for all five skills: answer, refuse, critique, revise, prefer.

The last three use the prompts of ``services.contracts.critique`` word for word, over every principle of the default
constitution, so that the critique service meets the model exactly as it was trained.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from services.contracts.constitution import Constitution, Principle, load_constitution
from services.contracts.critique import critique_prompt, preference_prompt, revision_prompt
from trainer.miniature.corpus import Item, Writer

CONSTITUTION = Path(__file__).parents[2] / "services" / "critique" / "constitutions" / "default.toml"
MIX = {"benign": 0.44, "alarming": 0.16, "refusal": 0.19, "critique": 0.09, "revision": 0.06, "preference": 0.06}
SYSTEM_SHARE = 0.05
SECOND_TURN_SHARE = 0.05
HARMLESS_BUT_REFUSING = "safe-and-useful"


class Example(NamedTuple):
    """One dialogue: ``turns`` alternate prompt and response; ``kind`` is a key of ``MIX``."""

    turns: tuple[str, ...]
    kind: str


class Draft(NamedTuple):
    """An answer to criticise, and which critiques and revision fit it."""

    text: str
    finding: str  # a key of critiques.txt
    topic: str


def default_constitution() -> Constitution:
    """The constitution that the critique service ships."""
    return load_constitution(CONSTITUTION)


class TaskWriter:
    """Draws examples of every skill with a ``Writer``'s items."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.rng = writer.rng
        self.principles = default_constitution().principles

    def example(self) -> Example:
        """One example, its kind drawn by ``MIX``; now and then with a system message or an earlier turn."""
        kind = self.rng.choices(list(MIX), weights=list(MIX.values()))[0]
        prompt, response = self.draw(kind)
        if kind in {"benign", "alarming", "refusal"}:
            if self.rng.random() < SYSTEM_SHARE:
                system = self.rng.choice(self.writer.lexicon.wrappers["system"])
                return Example((f"{system}\n\n{prompt}", response), kind)
            if self.rng.random() < SECOND_TURN_SHARE:
                return Example((*self.draw(self.rng.choice(("benign", "benign", "refusal"))), prompt, response), kind)
        return Example((prompt, response), kind)

    def draw(self, kind: str) -> tuple[str, str]:
        """A prompt and its response of one kind."""
        writer = self.writer
        if kind == "critique":
            return self.critique()[:2]
        if kind == "revision":
            return self.revision()
        if kind == "preference":
            return self.preference()
        draws = {"benign": writer.benign, "alarming": writer.alarming, "refusal": writer.harmful}
        item = writer.clean(draws[kind])
        return item.prompt, item.response

    def critique(self) -> tuple[str, str, Item]:
        """A critique prompt, the critique, and the item it is about."""
        item, principle = self._item(), self.rng.choice(self.principles)
        draft = self._draft(item)
        return critique_prompt(principle, item.prompt, draft.text), self._critique(principle, item, draft), item

    def revision(self) -> tuple[str, str]:
        """A revision prompt and the revision: a kind refusal, the kept answer, or a helpful one."""
        item, principle = self._item(), self.rng.choice(self.principles)
        draft = self._draft(item)
        critique = self._critique(principle, item, draft)
        if item.harmful:
            answer = self.writer.wording(self.writer.lexicon.revisions, draft.topic, item.hazard)
        else:
            answer = draft.text if draft.finding == "fine" else item.response
        return revision_prompt(principle, item.prompt, draft.text, critique), answer

    def preference(self) -> tuple[str, str]:
        """A preference prompt and the better answer's letter, both positions alike."""
        item, principle = self._item(), self.rng.choice(self.principles)
        refusal = self.writer.refusal(item.topic, item.hazard)
        if item.harmful:
            better, worse = refusal, self._compliance(item)
            if self.rng.random() < 0.3:
                better = self.writer.wording(self.writer.lexicon.revisions, item.topic, item.hazard)
        else:
            better, worse = item.response, refusal if self.rng.random() < 0.8 else self._harmful_answer()
        first = self.rng.random() < 0.5
        answers = (better, worse) if first else (worse, better)
        return preference_prompt(principle, item.prompt, *answers), "A" if first else "B"

    def _item(self) -> Item:
        writer, kind = self.writer, self.rng.random()
        draw = writer.harmful if kind < 0.5 else writer.benign if kind < 0.8 else writer.alarming
        return writer.clean(draw)

    def _draft(self, item: Item) -> Draft:
        """An answer of any sort: what a good, a misled or an over-careful model would say."""
        kind = self.rng.random()
        if item.harmful:
            if kind < 0.4:
                return Draft(self.writer.refusal(item.topic, item.hazard), "declined", item.topic)
            return Draft(self._compliance(item), "harmful", item.topic)
        if kind < 0.2:
            return Draft(self.writer.refusal(item.topic, item.hazard), "overcautious", item.topic)
        if kind < 0.25:
            other = self.writer.clean(self.writer.own_harmful)
            return Draft(other.opening, "harmful", other.topic)
        if kind < 0.35:
            return Draft(item.opening, "fine", item.topic)
        return Draft(item.response, "fine", item.topic)

    def _compliance(self, item: Item) -> str:
        """A harmful answer: an affirmative opening, or an ordinary answer as if nothing were wrong."""
        kind = self.rng.random()
        if kind < 0.55:
            return item.opening
        ordinary = self.writer.clean(self.writer.benign)
        if kind < 0.75:
            return f"{item.opening} {ordinary.response}"
        return ordinary.response if kind < 0.9 else ordinary.opening

    def _harmful_answer(self) -> str:
        return self.writer.clean(self.writer.own_harmful).opening

    def _critique(self, principle: Principle, item: Item, draft: Draft) -> str:
        finding = draft.finding
        if finding == "overcautious" and principle.id != HARMLESS_BUT_REFUSING:
            finding = "overcautious-ok"
        return self.writer.wording(self.writer.lexicon.critiques[finding], draft.topic, item.hazard)


def examples(seed: int | str, data: Path | None = None, *, hold_out: bool = False) -> Iterator[Example]:
    """An endless stream of examples; the same seed and data folder give the same stream."""
    tasks = TaskWriter(Writer(seed, data, hold_out=hold_out))
    while True:
        yield tasks.example()
