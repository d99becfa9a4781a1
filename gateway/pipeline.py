"""How a request flows. This is the file to read first.

::

    client --> read_chat --+--> prompt check (safety) ------------+
                           |                                      +--> release, in order
                           +--> generation (inference) --> answer +
                                                           checks (safety)

Generation starts beside the prompt check, so that an allowed request waits for the slower of the two and not for
both; nothing leaves before the prompt's verdict, and no text leaves before its own. Whatever fails, fails closed:
an error ends the request and what is held is dropped.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from gateway.answers import Head, blocked_chunk, blocked_completion, chunk, completion, usage_chunk
from gateway.chat import Chat
from gateway.checks import prompt_items, response_items
from gateway.metrics import DECISIONS, Ledger
from gateway.policy import Action, Decision, Direction, DirectionPolicy, Policy, PromptPolicy, decide
from gateway.settings import GatewaySettings
from gateway.streaming import CheckedAnswer
from gateway.upstreams import PassedOn, Upstreams
from services.common.logs import get_logger
from services.contracts.chat import Json, Usage
from services.contracts.errors import FedwardError, Overloaded
from services.contracts.verdicts import ClassifyItem

T = TypeVar("T")
NO_TOKENS = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0)


class Pipeline:
    """The way of one request through checks and generation."""

    def __init__(self, upstreams: Upstreams, settings: GatewaySettings) -> None:
        self._upstreams = upstreams
        self._settings = settings
        self._busy = 0
        self._policy = Policy(
            prompt=PromptPolicy(threshold=settings.prompt_threshold),
            response=DirectionPolicy(threshold=settings.response_threshold),
        )

    async def answer(self, chat: Chat) -> Json:
        """A whole answer, or the refusal in its place; raises a FedwardError when it cannot be made or checked."""
        ledger = Ledger()
        async with self._place(chat):
            async with _beside(self._upstreams.complete(chat.content)) as generation:
                decision = await self._decide_prompt(chat)
                ledger.record(decision)
                if not decision.allowed:
                    return blocked_completion(Head.own(chat), decision, NO_TOKENS)  # leaving cancels the generation
                answer = await generation

            text = answer.choices[0].message.content or ""
            decision = await self._decide_response(chat, text)
            ledger.record(decision, len(text))
            if not decision.allowed:
                return blocked_completion(Head.of(answer), decision, answer.usage)
            return completion(Head.of(answer), ledger.release(text), answer.choices[0].finish_reason, answer.usage)

    async def stream(self, chat: Chat) -> AsyncGenerator[Json, None]:
        """The events of a streamed answer, of which the last says how it ended; raises as ``answer`` does."""
        ledger, first = Ledger(), True
        checked = CheckedAnswer(
            self._upstreams.stream(chat.content), lambda text: self._decide_response(chat, text), self._settings
        )
        async with self._place(chat), checked as answer:
            decision = await self._decide_prompt(chat)
            ledger.record(decision)
            if decision.allowed:
                async for unit, decision in answer:
                    ledger.record(decision, len(unit))
                    if not decision.allowed:
                        break
                    yield chunk(answer.head or Head.own(chat), ledger.release(unit), first=first)
                    first = False
                else:
                    decision = await self._decide_response(chat, answer.text)

        # The generation has ended or has just been cancelled; what was still held is gone.
        head = answer.head or Head.own(chat)
        if not decision.allowed:
            yield blocked_chunk(head, decision, first=first)
            return
        yield chunk(head, first=first, finish_reason=answer.finish_reason)
        if answer.usage:
            yield usage_chunk(head, answer.usage)

    @asynccontextmanager
    async def _place(self, chat: Chat) -> AsyncIterator[None]:
        """One of the places for requests at work. What the inference service says when it refuses is checked as well.

        Raises:
            Overloaded: no place is free.
            PassedOn: the inference service refused; without its words when they are unsafe.
        """
        if self._busy >= self._settings.requests_in_flight:
            raise Overloaded(f"{self._busy} requests are at work, which is the limit; try again later")
        self._busy += 1
        try:
            yield
        except PassedOn as refusal:
            if not (await self._decide_response(chat, refusal.words())).allowed:
                raise refusal.without_detail() from refusal
            raise
        finally:
            self._busy -= 1

    async def _decide_prompt(self, chat: Chat) -> Decision:
        return await self._decide(prompt_items(chat, self._settings.window_characters), Direction.PROMPT)

    async def _decide_response(self, chat: Chat, text: str) -> Decision:
        return await self._decide(response_items(chat, text, self._settings.window_characters), Direction.RESPONSE)

    async def _decide(self, items: Sequence[ClassifyItem], direction: Direction) -> Decision:
        """Classify and decide; no verdict is an error, never an allowance."""
        if not items:  # white space only: there is nothing to judge
            return Decision(Action.ALLOW, direction)
        try:
            decision = decide(await self._upstreams.classify(items, direction), direction, self._policy)
        except FedwardError as error:
            DECISIONS.labels(direction.value, "unavailable").inc()
            get_logger().warning("check failed", direction=direction.value, error=error.message)
            raise
        DECISIONS.labels(direction.value, decision.action.value).inc()
        if not decision.allowed:
            get_logger().info("refused", direction=direction.value, categories=decision.categories)
        return decision


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run ``work`` beside the block; leaving the block cancels it, if it still runs."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
