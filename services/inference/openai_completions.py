"""OpenAI's older completion protocol: raw prompts, continued or scored (``echo`` with ``logprobs``).

Evaluation harnesses score texts with it: they send prompt and continuation with ``echo``, ``logprobs`` and
``max_tokens`` 0 or 1, and read the continuation's log-probabilities.
"""

import time
import uuid
from collections.abc import AsyncIterator, Sequence

from services.contracts.chat import Completion, CompletionChoice, CompletionLogprobs, Json, Usage
from services.contracts.errors import FedwardError
from services.inference.answers import Answer, Pieces
from services.inference.events import DONE, event
from services.inference.generation import Finish
from services.inference.model import BaseModel
from services.inference.openai_chat import REASONS
from services.inference.openai_requests import CompletionBody, wants_usage
from services.inference.sampling import Score
from services.inference.vocabulary import finite


class Writer:
    """Writes one choice: its text, and the entries of its tokens with their places in that text.

    Special tokens have no width, as the text is without them, unless the caller's own prompt spells them out.
    """

    def __init__(self, pieces: Pieces, prompt: str | list[int], body: CompletionBody, base: BaseModel) -> None:
        self._pieces = pieces
        self._echo = body.echo
        self._wanted = body.logprobs is not None
        self._vocabulary = base.vocabulary
        self._detokenizer = base.detokenizer([] if body.echo else pieces.generation.prompt_ids)
        self._prompt = base.decode(prompt) if isinstance(prompt, list) else prompt
        self._offset = 0

    def prompt(self) -> tuple[str, CompletionLogprobs | None]:
        """The echoed prompt with its entries; nothing when there is no echo."""
        if not self._echo:
            return "", None
        first = Score(self._pieces.generation.prompt_ids[0], 0.0, [])
        entries = self.entries([first, *self._pieces.prompt_scores])
        if entries is not None:
            entries.token_logprobs[0] = entries.top_logprobs[0] = None  # nothing predicts the first token
        self._offset = len(self._prompt)  # a tokenizer may write a text otherwise than the caller did
        return self._prompt, entries

    def entries(self, scores: Sequence[Score]) -> CompletionLogprobs | None:
        """The entries of the next tokens; None when log-probabilities are not asked for."""
        if not self._wanted:
            return None
        names: list[str] = []
        offsets: list[int] = []
        tops: list[dict[str, float] | None] = []
        for score in scores:
            names.append(self._vocabulary.name(score.token_id))
            offsets.append(self._offset)
            self._offset += self._width(score.token_id)
            top: dict[str, float] = {}
            for token_id, logprob in (*score.top, (score.token_id, score.logprob)):
                top.setdefault(self._vocabulary.name(token_id), finite(logprob))
            tops.append(top)
        logprobs: list[float | None] = [finite(score.logprob) for score in scores]
        return CompletionLogprobs(tokens=names, token_logprobs=logprobs, top_logprobs=tops, text_offset=offsets)

    def _width(self, token_id: int) -> int:
        special = self._vocabulary.special(token_id)
        if special is None:
            return len(self._detokenizer.add(token_id))
        return len(special) if self._prompt.startswith(special, self._offset) else 0


def completion(all_pieces: Sequence[Pieces], answers: Sequence[Answer], body: CompletionBody, base: BaseModel) -> Json:
    """The body of the answers to all prompts. ``model`` and ``system_fingerprint`` name the variant that wrote them."""
    choices = []
    for index, (pieces, answer, prompt) in enumerate(zip(all_pieces, answers, body.prompts(), strict=True)):
        writer = Writer(pieces, prompt, body, base)
        echoed, before = writer.prompt()
        after = writer.entries([piece.score for piece in answer.pieces if not piece.special])
        choices.append(
            CompletionChoice(
                index=index,
                text=echoed + answer.text,
                logprobs=_joined(before, after),
                finish_reason=REASONS[answer.finish],
            )
        )
    usages = [pieces.usage() for pieces in all_pieces]
    usage = Usage(
        prompt_tokens=sum(one.prompt_tokens for one in usages),
        completion_tokens=sum(one.completion_tokens for one in usages),
        total_tokens=sum(one.total_tokens for one in usages),
    )
    return _head(all_pieces[0]).model_copy(update={"choices": choices, "usage": usage}).model_dump()


async def events(pieces: Pieces, body: CompletionBody, base: BaseModel) -> AsyncIterator[str]:
    """The server-sent events of one streamed answer; an error on the way becomes an error event and ends the stream."""
    head = _head(pieces)
    writer = Writer(pieces, body.prompts()[0], body, base)
    begun = False
    try:
        async for piece in pieces:
            if not begun and body.echo:
                yield _event(head, *writer.prompt())
            begun = True
            entries = None if piece.special else writer.entries([piece.score])
            yield _event(head, piece.text, entries, piece.finish)
    except FedwardError as error:
        yield event(error.body())
        return
    if not begun:  # the prompt is scored, and no answer wanted
        yield _event(head, *writer.prompt(), Finish.LENGTH)
    if wants_usage(body):
        yield event(head.model_copy(update={"usage": pieces.usage()}).model_dump())
    yield DONE


def _head(pieces: Pieces) -> Completion:
    variant = pieces.generation.variant
    return Completion(
        id=f"cmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=variant.name,
        choices=[],
        system_fingerprint=variant.sha256,
    )


def _event(head: Completion, text: str, logprobs: CompletionLogprobs | None, finish: Finish | None = None) -> str:
    reason = REASONS[finish] if finish else None
    choice = CompletionChoice(index=0, text=text, logprobs=logprobs, finish_reason=reason)
    return event(head.model_copy(update={"choices": [choice]}).model_dump(exclude={"usage"}))


def _joined(before: CompletionLogprobs | None, after: CompletionLogprobs | None) -> CompletionLogprobs | None:
    if before is None or after is None:
        return after
    return CompletionLogprobs(
        tokens=before.tokens + after.tokens,
        token_logprobs=before.token_logprobs + after.token_logprobs,
        top_logprobs=before.top_logprobs + after.top_logprobs,
        text_offset=before.text_offset + after.text_offset,
    )
