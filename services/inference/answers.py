"""Waiting for an answer from the event loop: pieces come from the worker thread, and leaving early cancels."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from services.contracts.chat import Usage
from services.contracts.errors import FedwardError
from services.inference.engine import Engine
from services.inference.generation import Finish, Generation, Piece, PromptScores, Update
from services.inference.sampling import Score


@dataclass(frozen=True)
class Answer:
    """A finished answer; ``pieces`` is empty when only the prompt was scored."""

    text: str
    finish: Finish
    pieces: list[Piece]


class Pieces:
    """The pieces of one submitted generation, to be iterated over once.

    ``prompt_scores`` is filled in before the first piece comes, when the generation scores its prompt.
    Ending the iteration early, by an error, a disconnect or a cancelled task, cancels the generation.
    """

    def __init__(self, engine: Engine, generation: Generation, *, streaming: bool) -> None:
        """Submit the generation; ``streaming`` wakes the reader for each piece instead of once at the end.

        Raises:
            Overloaded: the engine's queue is full.
        """
        self.generation = generation
        self.prompt_scores: list[Score] = []
        self._loop = asyncio.get_running_loop()
        self._streaming = streaming
        self._came: deque[Update] = deque()
        self._awake = asyncio.Event()
        generation.deliver = self._deliver
        engine.submit(generation)

    def _deliver(self, update: Update) -> None:
        """Called by the worker thread."""
        self._came.append(update)
        if self._streaming or isinstance(update, FedwardError) or update.finish is not None:
            self._loop.call_soon_threadsafe(self._awake.set)

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while True:
                await self._awake.wait()
                self._awake.clear()
                while self._came:
                    update = self._came.popleft()
                    if isinstance(update, FedwardError):
                        raise update
                    if isinstance(update, PromptScores):
                        self.prompt_scores = update.scores
                    else:
                        yield update
                    if update.finish is not None:
                        return
        finally:
            self.generation.cancel()

    async def answer(self) -> Answer:
        """The whole answer; raises the error that ended it, if one did."""
        pieces = [piece async for piece in self]
        finish = pieces[-1].finish if pieces else Finish.LENGTH
        assert finish is not None
        return Answer("".join(piece.text for piece in pieces), finish, pieces)

    def usage(self) -> Usage:
        """Tokens read and written so far; the end token counts as written, as in TGI and vLLM."""
        prompt, written = len(self.generation.prompt_ids), self.generation.generated
        return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


async def all_answers(all_pieces: Sequence[Pieces]) -> list[Answer]:
    """The whole answers, in order; when one fails or nobody waits any more, the others are cancelled."""
    try:
        return await asyncio.gather(*(pieces.answer() for pieces in all_pieces))
    finally:
        for pieces in all_pieces:
            pieces.generation.cancel()
