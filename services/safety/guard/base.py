"""From a conversation to a verdict: ask the guard model, read its answers, and say ``unscored`` when that fails."""

import asyncio
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from services.contracts.chat import ChatMessage
from services.contracts.errors import UpstreamError
from services.contracts.verdicts import Outcome, Verdict
from services.safety.guard.families import Ask, Family
from services.safety.guard.parsing import Answer, Finding, Unreadable
from services.safety.guard.prompts import Turn, broken_markers, of_response, read_turns

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class Thresholds(NamedTuple):
    """The least P(unsafe) at which a prompt, or a response, is unsafe."""

    prompt: float
    response: float


DEFAULT_THRESHOLDS = Thresholds(0.5, 0.5)  # where a guard model's own answer tips over


class Unasked(Exception):
    """A conversation cannot be put to the model; the text says why and quotes nothing."""


class Guard(ABC):
    """A guard model of some family; a subclass gets its answers.

    Args:
        family: how it is asked and read.
        model_id: the name that its verdicts bear.
        thresholds: the least P(unsafe) at which an item is unsafe.
    """

    def __init__(self, family: Family, model_id: str, thresholds: Thresholds = DEFAULT_THRESHOLDS) -> None:
        self.model_id = model_id
        self.identity = hashlib.sha256(f"{model_id} {family!r}".encode()).hexdigest()
        self.thresholds = thresholds
        self._family = family

    @abstractmethod
    async def ready(self) -> str | None:
        """None when the model can be asked, else the reason why not."""

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of connections and threads."""

    @abstractmethod
    async def _answer(self, ask: Ask) -> Answer:
        """The model's answer; raises UpstreamError, Unasked or Unreadable when there is none."""

    def _plain(self, text: str) -> str:
        """The text with nothing in it that the model could take for a control token."""
        return broken_markers(text)

    async def classify(self, messages: Sequence[ChatMessage]) -> Verdict:
        """Judge a conversation by its last turn: a response when that is the assistant's, else a prompt.

        Whatever goes wrong gives an ``unscored`` verdict with a reason that quotes neither text nor answer.
        """
        turns = read_turns(messages)
        if not turns or not turns[-1].text.strip():
            return self._unscored("the conversation's last turn has no text", self.thresholds.prompt)
        if any(_LONE_SURROGATE.search(turn.text) for turn in turns):
            reason = "the conversation is not valid Unicode: it holds one half of a surrogate pair"
            return self._unscored(reason, self.thresholds.prompt)
        turns = [Turn(turn.role, self._plain(turn.text)) for turn in turns]
        threshold = self.thresholds.response if of_response(turns) else self.thresholds.prompt
        found = await asyncio.gather(*(self._find(ask, of_response(turns)) for ask in self._family.asks(turns)))
        findings = [one for one in found if isinstance(one, Finding)]
        failures = [one for one in found if isinstance(one, str)]
        score = max((finding.score for finding in findings), default=0.0)
        if failures and score < threshold:
            return self._unscored(failures[0], threshold)
        return self._verdict(score, threshold, findings)

    async def _find(self, ask: Ask, has_response: bool) -> Finding | str:
        """The finding of one request, or why there is none."""
        try:
            answer = await self._answer(ask)
            if ask.needs_end and answer.cut_off:
                raise Unreadable("the answer was cut off")
            return self._family.read(ask, answer, of_response=has_response)
        except Unreadable as error:
            return f"the guard model's answer cannot be read: {error}"
        except (UpstreamError, Unasked) as error:
            return str(error)

    def _verdict(self, score: float, threshold: float, findings: Sequence[Finding]) -> Verdict:
        categories: dict[str, float] = {}
        for finding in findings:
            for hazard, value in finding.categories.items():
                categories[str(hazard)] = max(value, categories.get(hazard, 0.0))
        return Verdict(
            outcome=Outcome.UNSAFE if score >= threshold else Outcome.SAFE,
            score=score,
            threshold=threshold,
            categories=categories,
            refused=next((finding.refused for finding in findings if finding.refused is not None), None),
            model_id=self.model_id,
        )

    def _unscored(self, reason: str, threshold: float) -> Verdict:
        return Verdict(outcome=Outcome.UNSCORED, threshold=threshold, model_id=self.model_id, reason=reason)
