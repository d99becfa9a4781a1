"""Reading what a guard model answers: strictly its documented form, or not at all.

Only text that the model itself wrote comes in here. An answer that is not exactly in the documented form raises
``Unreadable``, which becomes an ``unscored`` verdict; no half-understood answer is ever read as safe.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from services.contracts.hazards import HazardCategory

# At temperature 0 the written label is the likeliest one; this much is left to rounding.
_TOLERANCE = 0.01
_CODES = r"S[0-9]{1,2}(?:[ \t]*,[ \t]*S[0-9]{1,2})*"
_LLAMA_GUARD = re.compile(rf"(safe|unsafe)(?:[ \t]*\n\s*({_CODES}))?")
_QWEN = re.compile(r"Safety: (Safe|Unsafe|Controversial)\nCategories: ([^\n]+)(?:\nRefusal: (Yes|No))?")
_SHIELD = re.compile(r"(Yes|No)")
_WILDGUARD = re.compile(
    r"Harmful request:[ \t]*(yes|no)[ \t]*\n"
    r"Response refusal:[ \t]*(yes|no|n/a)[ \t]*\n"
    r"Harmful response:[ \t]*(yes|no|n/a)",
    re.ASCII | re.IGNORECASE,
)
# ASCII: without it, IGNORECASE takes look-alikes such as the long s for the letters.
_YES_NO = re.compile(rf"(yes|no)(?:[ \t]*:[ \t]*({_CODES}))?[ \t]*\.?", re.ASCII | re.IGNORECASE)


class Unreadable(Exception):
    """An answer is not in its family's documented form; the text says why and quotes nothing."""


class Position(NamedTuple):
    """One token of an answer, and the probabilities of the likeliest tokens in its place."""

    token: str
    probabilities: Mapping[str, float]


class Answer(NamedTuple):
    """What a guard model wrote; ``positions`` is empty where the server gives no log-probabilities."""

    text: str
    cut_off: bool = False
    positions: Sequence[Position] = ()


class Finding(NamedTuple):
    """An answer's meaning: P(unsafe) in [0, 1], scores by hazard id, and whether the response declines.

    A hazard without a score was not judged by itself; one with 0 was, and not found.
    """

    score: float
    categories: dict[str, float]
    refused: bool | None = None


def llama_guard(answer: Answer) -> Finding:
    """Read ``safe``, or ``unsafe`` with a line of category ids such as ``S1,S9``."""
    said, codes = _match(_LLAMA_GUARD, answer).groups()
    if said == "safe" and codes:
        raise Unreadable("it calls the item safe and names hazard categories")
    score = _score(answer, said, ("safe", "unsafe"), {"unsafe"})
    return Finding(score, _scores(_known(codes), HazardCategory, score))


def qwen3guard(
    answer: Answer, *, of_response: bool, unsafe: Collection[str], categories: Mapping[str, HazardCategory]
) -> Finding:
    """Read the lines ``Safety:``, ``Categories:`` and, about a response, ``Refusal:``.

    Args:
        answer: what the model wrote.
        of_response: a response was classified, so the third line has to be there.
        unsafe: the labels that count as unsafe, of Safe, Unsafe and Controversial.
        categories: the model's category names as hazards; a name that is not among them has no score.
    """
    label, names, refusal = _match(_QWEN, answer).groups()
    if of_response != (refusal is not None):
        raise Unreadable("the line on refusal is missing, or stands where there is no response")
    if (label == "Safe") != (names.strip() == "None"):
        raise Unreadable("its label and its categories contradict each other")
    score = _score(answer, label, ("Safe", "Unsafe", "Controversial"), unsafe, after="Safety:")
    found = [categories[name] for name in map(str.strip, names.split(",")) if name in categories]
    return Finding(score, _scores(found, categories.values(), score), None if refusal is None else refusal == "Yes")


def shieldgemma(answer: Answer, categories: Sequence[HazardCategory]) -> Finding:
    """Read ``Yes`` or ``No``; the score is P(Yes) / (P(Yes) + P(No)), for which log-probabilities are needed."""
    said = _match(_SHIELD, answer)[1]
    score = _score(answer, said, ("Yes", "No"), {"Yes"}, needed=True)
    return Finding(score, dict.fromkeys(categories, score))


def wildguard(answer: Answer, *, of_response: bool) -> Finding:
    """Read the three lines on harmful request, refusal and harmful response; ``n/a`` where there is no response."""
    request, refusal, response = (word.lower() for word in _match(_WILDGUARD, answer).groups())
    said = response if of_response else request
    if said == "n/a":
        raise Unreadable("it gives no finding on the response")
    after = "Harmful response:" if of_response else "Harmful request:"
    refused = None if not of_response or refusal == "n/a" else refusal == "yes"
    return Finding(_score(answer, said, ("yes", "no"), {"yes"}, after=after), {}, refused)


def yes_no(answer: Answer) -> Finding:
    """Read ``no``, or ``yes`` with or without category ids: ``yes: S1, S9``."""
    said, codes = _match(_YES_NO, answer).groups()
    if said.lower() == "no" and codes:
        raise Unreadable("it answers no and names hazard categories")
    score = _score(answer, said.lower(), ("yes", "no"), {"yes"})
    return Finding(score, _scores(_known(codes), HazardCategory, score))


def _match(pattern: re.Pattern[str], answer: Answer) -> re.Match[str]:
    text = answer.text.strip(" \t\r\n")
    if not text:
        raise Unreadable("the answer is empty")
    found = pattern.fullmatch(text)
    if found is None:
        raise Unreadable("the answer is not in the form that the model's documentation gives")
    return found


def _known(codes: str | None) -> list[HazardCategory]:
    """The hazards among category ids; an id outside the taxonomy has no score, but makes the item no less unsafe."""
    written = re.findall(r"S[0-9]+", codes or "", re.IGNORECASE)
    return [hazard for hazard in HazardCategory if hazard in written]


def _scores(named: Collection[HazardCategory], judged: Iterable[HazardCategory], score: float) -> dict[str, float]:
    """The named hazards with the answer's score, the others that the model judges with 0; none where it names none."""
    return {hazard: score if hazard in named else 0.0 for hazard in judged} if named else {}


def _score(
    answer: Answer, said: str, labels: Sequence[str], unsafe: Collection[str], *, after: str = "", needed: bool = False
) -> float:
    """P(unsafe) among the labels by log-probabilities; without them 1 or 0 by the label, unless they are needed."""
    found = _shares(answer, labels, after)
    if found is None and needed:
        raise Unreadable("the server gave no log-probabilities of Yes and No, from which the score comes")
    if found is None:
        return float(said in unsafe)
    if found[said] + _TOLERANCE < max(found.values()):
        raise Unreadable("its log-probabilities contradict its text")
    # The likeliest of three labels may have less than a half: an unsafe one must still reach the usual threshold.
    least = 0.5 if said in unsafe else 0.0
    return max(least, min(1.0, sum(found[label] for label in unsafe)))


def _shares(answer: Answer, labels: Sequence[str], after: str) -> dict[str, float] | None:
    """The labels' probabilities, summing to 1, where the label stands: the first token that follows ``after``.

    A tokenizer may cut a label into pieces: a token counts for the label that it begins. None when no such place, or
    no label, is to be found. White space is left out, since servers differ in what they make of it.
    """
    written, header = "", _squeezed(after)
    for position in answer.positions:
        token = _squeezed(position.token)
        if token and written.endswith(header):
            break
        written += token
    else:
        return None
    likely = [(_squeezed(token), probability) for token, probability in position.probabilities.items()]
    sums = {label: sum(p for token, p in likely if token and label.lower().startswith(token)) for label in labels}
    total = sum(sums.values())
    return {label: value / total for label, value in sums.items()} if total > 0 else None


def _squeezed(text: str) -> str:
    return "".join(text.split()).lower()
