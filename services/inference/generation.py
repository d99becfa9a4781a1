"""One answer being written: what was asked for, what has come so far, and who is told."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from transformers import PreTrainedModel

from services.contracts.errors import FedwardError
from services.inference.sampling import Sampler, Score
from services.inference.text import Detokenizer, StopScanner


class Finish(Enum):
    """Why an answer ended."""

    END = "end"  # the model wrote its end token
    STOP = "stop"  # a stop string came
    LENGTH = "length"  # the limit of tokens was reached


@dataclass(frozen=True, slots=True)
class Piece:
    """One generated token, and the text that may be sent since it came.

    ``text`` is empty while a character or a stop string may be incomplete; the pieces' texts joined are the answer.
    The last piece of an answer has ``finish`` set. ``special`` marks a token that ends answers and is no text.
    """

    score: Score
    text: str
    special: bool
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The scores of a prompt's tokens but for the first, which nothing predicts; it comes before any piece.

    ``finish`` is set when this is all that was asked for.
    """

    scores: list[Score]
    finish: Finish | None


Update = Piece | PromptScores | FedwardError


@dataclass(frozen=True, eq=False)
class Variant:
    """Weights that can answer: the base model, or the base with one adapter merged in; never changed once made."""

    name: str
    sha256: str
    network: PreTrainedModel


class Generation:
    """A request's way through the engine.

    The worker thread calls ``accept`` and ``fail``; any thread may call ``cancel``. ``deliver`` is called from the
    worker thread with each piece, or with the error that ended the answer.

    Args:
        variant: the weights that write it.
        prompt_ids: what is continued; at least one token.
        max_tokens: most tokens of the answer; 0 only with ``scores_prompt``.
        sampler: how tokens are drawn; None takes the likeliest.
        end_ids: tokens that end an answer.
        detokenizer, stops: what turns tokens into text that may be sent.
        top: how many alternatives of each token are reported.
        scores_prompt: whether the prompt's own tokens are scored.
    """

    def __init__(
        self,
        *,
        variant: Variant,
        prompt_ids: list[int],
        max_tokens: int,
        sampler: Sampler | None,
        end_ids: frozenset[int],
        detokenizer: Detokenizer,
        stops: StopScanner,
        top: int = 0,
        scores_prompt: bool = False,
    ) -> None:
        self.variant = variant
        self.prompt_ids = prompt_ids
        self.max_tokens = max_tokens
        self.sampler = sampler
        self.top = top
        self.scores_prompt = scores_prompt
        self.deliver: Callable[[Update], None] = lambda update: None
        self.generated = 0
        self._ended = False
        self._cancelled = False
        self._end_ids = end_ids
        self._detokenizer = detokenizer
        self._stops = stops

    @property
    def over(self) -> bool:
        """Nothing more is to be written: the answer has ended, or nobody waits for it."""
        return self._ended or self._cancelled

    def accept_prompt(self, scores: list[Score]) -> None:
        """Take the prompt's scores; that is all when no answer is wanted."""
        finish = None if self.max_tokens else Finish.LENGTH
        self._ended = finish is not None
        self.deliver(PromptScores(scores, finish))

    def accept(self, score: Score) -> None:
        """Take the next token and pass on what it gives."""
        self.generated += 1
        ended = score.token_id in self._end_ids
        text = "" if ended else self._stops.add(self._detokenizer.add(score.token_id))
        if ended or self.generated >= self.max_tokens:
            text += self._stops.add(self._detokenizer.flush()) + self._stops.flush()
        finish = self._finish(ended)
        self._ended = finish is not None
        self.deliver(Piece(score, text, ended, finish))

    def _finish(self, ended: bool) -> Finish | None:
        if self._stops.found:
            return Finish.STOP
        if ended:
            return Finish.END
        return Finish.LENGTH if self.generated >= self.max_tokens else None

    def fail(self, error: FedwardError) -> None:
        """End the answer with an error."""
        self._ended = True
        self.deliver(error)

    def cancel(self) -> None:
        """Nobody waits for this answer any more: its place in the batch is freed before the next step."""
        self._cancelled = True
