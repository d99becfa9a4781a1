"""Training texts for the heads that read responses: compliance, refusals and ordinary answers.

Compliance is an affirmative opening and nothing more: what would follow is not written down anywhere here.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from services.safety.embedded.refusal import has_refusal_phrase
from services.safety.training.rows import Row
from services.safety.training.sources import read_json
from services.safety.training.wording import categorised, crossed_acts, fill, frames, lines

_NOUN_REQUEST = re.compile(
    "^(?:please |can you |could you )?(?:write|create|develop|design|draft|compose|generate|make|provide|give me"
    r"|produce|outline|publish)\s+(?:me )?(?=an?\b|the\b|some\b|\w+s\b)",
    re.IGNORECASE,
)
_HOW_REQUEST = re.compile(
    "^(?:how (?:do i|can i|do you|could i|would i|to|can you|can one|might one)|explain how to|teach me (?:how )?to"
    r"|tell me how to|describe how to|show me how to)\s+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answer:
    """A response with the labels of both heads that read it."""

    text: str
    unsafe: bool
    refused: bool
    source: str
    weight: float = 1.0
    group: str = ""

    @property
    def key(self) -> str:
        """What a split goes by: the group, or the text itself."""
        return self.group or self.text

    def content_row(self) -> Row:
        """The response as the content head sees it."""
        return Row(self.text, self.unsafe, self.source, self.weight, group=self.group)

    def refusal_row(self) -> Row:
        """The response as the refusal head sees it; there ``unsafe`` means "refused"."""
        return Row(self.text, self.refused, self.source, self.weight, group=self.group)


def affirmative(prompt: str) -> str | None:
    """The opening of an answer that complies with ``prompt``, or None when the prompt's form is not known."""
    first = prompt.strip().rstrip(" .?!").splitlines()[0] if prompt.strip() else ""
    for pattern, opening in ((_HOW_REQUEST, "Sure, here is how to "), (_NOUN_REQUEST, "Sure, here is ")):
        found = pattern.match(first)
        if found:
            return f"{opening}{first[found.end() :]}:"
    return None


def own_answers(seed: int) -> list[Answer]:
    """Answers of our own wording: compliance with harmful and harmless wishes, refusals, ordinary answers."""
    rng = random.Random(seed)
    acts = [act for _, act in categorised("acts_harmful")] + [act for act, harmful in crossed_acts(rng, 3) if harmful]
    artifacts = [artifact for _, artifact in categorised("artifacts_harmful")]
    good_acts = lines("acts_benign") + [act for act, harmful in crossed_acts(rng, 3) if not harmful]
    return [
        *_filled(rng, "comply_act", acts, 4, unsafe=True),
        *_filled(rng, "comply_artifact", artifacts, 5, unsafe=True),
        *_filled(rng, "comply_act", good_acts, 4),
        *_filled(rng, "answer_benign", lines("acts_benign"), 2),
        *_filled(rng, "comply_artifact", lines("artifacts_benign"), 5),
        *_filled(rng, "answer_knowledge", [noun for _, noun in categorised("nouns_alarming")], 3),
        *_filled(rng, "refuse_act", acts, 3, refused=True),
        *_filled(rng, "refuse_artifact", artifacts, 3, refused=True),
        *_filled(rng, "refuse", [str(number) for number in range(60)], 12, refused=True),
    ]


def _filled(
    rng: random.Random, name: str, phrases: list[str], count: int, *, unsafe: bool = False, refused: bool = False
) -> Iterator[Answer]:
    for phrase in phrases:
        for frame in rng.sample(frames()[name], count):
            text = fill(frame, phrase)
            if refused:
                text = f"{text} {rng.choice(frames()['refuse_tail'])}".strip()
            yield Answer(text, unsafe, refused, "own_answers", group=phrase)


def answers_to(prompts: list[Row]) -> Iterator[Answer]:
    """The affirmative opening for each public harmful prompt whose form allows one."""
    for row in prompts:
        text = affirmative(row.text) if row.unsafe else None
        if text is not None:
            yield Answer(text, True, False, f"answers_{row.source}", row.weight, row.group or row.text)


def ordinary_answers(data: Path) -> Iterator[Answer]:
    """Harmless answers of public data: school arithmetic, and the preferred turns of hh-rlhf.

    hh-rlhf has no refusal labels; there the phrase list stands in for them, at a low weight.
    """
    for item in read_json(data / "gsm8k/gsm8k.json")[:1500]:
        yield Answer(item["output"], False, False, "gsm8k")
    for item in read_json(data / "hh_rlhf/test.jsonl.gz"):
        opening, *turns = re.split(r"\n\nAssistant: ?", item["chosen"])
        for turn in turns:
            text = turn.split("\n\nHuman:")[0].strip()
            if len(text) > 20:
                yield Answer(text, False, has_refusal_phrase(text), "hh_rlhf", 0.5, opening)


def instruction_answers(data: Path) -> Iterator[tuple[str, Answer]]:
    """Prompts of Self-Instruct with their answers: harmless pairs of a source that sets the threshold."""
    for name in ("seed_tasks", "user_oriented_instructions"):
        for item in read_json(data / f"self_instruct/{name}.jsonl"):
            given, output = item["instances"][0]["input"], item["instances"][0]["output"]
            prompt = f"{item['instruction']}\n{given}" if given else item["instruction"]
            if output.strip():
                yield prompt, Answer(output, False, False, "self_instruct")
