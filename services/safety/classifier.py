"""The embedded n-gram classifier: reads a prompt, a prompt with its response, or a conversation.

Four linear heads over one set of hashed n-grams (:mod:`services.safety.features`):

* ``prompt``: does the prompt ask for harm?
* ``content``: is a response harmful in itself, by what it says or by setting out to do harm?
* ``refusal``: does a response decline? (together with the phrases of :mod:`services.safety.refusal`)
* ``categories``: one score for each hazard category that the training data allows.

How a response is scored::

    opening = max(P(prompt harmful), P(opening harmful)) x (1 - P(refused) if refused else 1)
    score   = max(opening, P(harmful) of every later window)

So a refusal of an unsafe prompt is safe, an answer that complies with one is unsafe whatever it says, and harm
further down in a long answer counts even after a polite opening. Long texts are cut into overlapping windows and
the highest score counts; nothing is left out.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from services.contracts.chat import ChatMessage
from services.contracts.errors import ConfigError, RequestError
from services.contracts.verdicts import ClassifierInfo, ClassifyItem, Outcome, Verdict
from services.safety.features import BUCKET_BITS, Features, features, normalise, windows, words
from services.safety.refusal import has_refusal_phrase
from services.safety.weights import SHIPPED, WeightsFile, read_weights

TIER = "n-gram"
MODEL_ID = "fedward-safety-ngram-1"
# Buckets of each block, as a power of two: a head with fewer folds the common buckets together.
HEAD_BITS = {"prompt": 18, "content": 17, "refusal": 15, "categories": 14}
# A text without letters or digits is read as harmless only when it is this short (a smiley, a thumbs-up): longer runs
# of symbols can spell something that this model cannot read.
MAX_SYMBOLS = 16
UNREADABLE = f"a text of more than {MAX_SYMBOLS} symbols without letters or digits"

Floats = npt.NDArray[np.float32]


class Reading(NamedTuple):
    """What a head says about one text: its first window, the highest of the later ones, and categories (C,)."""

    first: float
    later: float
    categories: Floats

    @property
    def score(self) -> float:
        """The highest score of any window."""
        return max(self.first, self.later)


class Conversation(NamedTuple):
    """An item in one form: the prompts that were put, and the response to the last, if there is one."""

    prompts: list[str]
    response: str | None


def fold(indices: npt.NDArray[np.int64], bits: int) -> npt.NDArray[np.int64]:
    """Indices into a head of 2 x 2**bits buckets."""
    return (indices & ((1 << bits) - 1)) + ((indices >> BUCKET_BITS) << bits)


def sigmoid(logits: Floats) -> Floats:
    """Logits as probabilities, without overflow."""
    halves: Floats = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return halves


def load_model(folder: Path = SHIPPED) -> "SafetyModel":
    """The model of a weights folder; raises ConfigError when the files are missing, malformed or tampered with."""
    file = read_weights(folder)
    try:
        return SafetyModel(file)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{folder}: the weights lack something that this version needs: {error!r}") from error


class SafetyModel:
    """The heads in memory. Stateless after construction: one object may serve many threads."""

    def __init__(self, file: WeightsFile) -> None:
        self.manifest = file.manifest
        self.category_ids = file.metadata["categories"].split(",")
        self.prompt_threshold = float(file.metadata["prompt_threshold"])
        self.response_threshold = float(file.metadata["response_threshold"])
        self._refusal_threshold = float(file.metadata["refusal_threshold"])
        self._phrase_precision = float(file.metadata["phrase_precision"])
        self._weights: dict[str, Floats] = {}
        for name, bits in HEAD_BITS.items():
            count = len(self.category_ids) if name == "categories" else 1
            self._weights[name] = file.tensors[name].astype(np.float32).reshape(count, 2 << bits)
        self._biases = {
            name: np.array(file.metadata[f"{name}_bias"].split(","), np.float32).reshape(-1) for name in HEAD_BITS
        }

    def info(self) -> ClassifierInfo:
        """What runs, and how well it does."""
        measured = {**self.manifest.measured, "response_threshold": self.response_threshold}
        return ClassifierInfo(
            model_id=self.manifest.model_id,
            tier=TIER,
            sha256=self.manifest.sha256,
            threshold=self.prompt_threshold,
            measured=measured,
        )

    def classify(self, item: ClassifyItem, name: str = "item") -> Verdict:
        """The verdict on one item; ``unscored`` when a text is symbols only (see ``readable``).

        Raises:
            RequestError: the prompt is empty, or the conversation holds nothing to classify.
        """
        conversation = read_item(item, name)
        texts = [*conversation.prompts, *([] if conversation.response is None else [conversation.response])]
        if not all(map(readable, texts)):
            return Verdict(outcome=Outcome.UNSCORED, model_id=self.manifest.model_id, reason=UNREADABLE)
        asked = [self._read("prompt", prompt) for prompt in conversation.prompts]
        harm = max(reading.score for reading in asked)
        categories = np.max([reading.categories for reading in asked], axis=0)
        if conversation.response is None:
            return self._verdict(harm, self.prompt_threshold, categories, None)
        content = self._read("content", conversation.response)
        declined = self._declined(conversation.response)
        opening = max(harm, content.first)
        score = opening if declined is None else opening * (1.0 - declined)
        categories = np.maximum(categories, content.categories)
        return self._verdict(max(score, content.later), self.response_threshold, categories, declined is not None)

    def prompt_score(self, prompt: str) -> float:
        """P(the prompt asks for harm), the maximum over its windows."""
        return self._read("prompt", prompt).score

    def content_score(self, text: str) -> float:
        """P(the text is harmful in itself), the maximum over its windows."""
        return self._read("content", text).score

    def refusal_score(self, response: str) -> float:
        """P(the response declines), by the learned head alone, from its first window."""
        return float(sigmoid(self.logits("refusal", features(_windows(response)[0])))[0])

    def category_scores(self, text: str) -> dict[str, float]:
        """The category scores of one text by hazard id."""
        return dict(zip(self.category_ids, map(float, self._read("prompt", text).categories), strict=True))

    def refuses(self, response: str) -> bool:
        """Whether the response declines, by a phrase or by the learned head."""
        return self._declined(response) is not None

    def _declined(self, response: str) -> float | None:
        """How sure it is that the response declines, or None when it does not."""
        probability = self.refusal_score(response)
        if has_refusal_phrase(response):
            return max(probability, self._phrase_precision)
        return probability if probability >= self._refusal_threshold else None

    def _read(self, head: str, text: str) -> Reading:
        """One head's scores of a text's windows; a text without words asks for nothing and says nothing."""
        found = _windows(text)
        if not found[0]:
            return Reading(0.0, 0.0, np.zeros(len(self.category_ids), np.float32))
        vectors = [features(window) for window in found]
        scores = sigmoid(np.concatenate([self.logits(head, vector) for vector in vectors]))
        categories = np.max([self.logits("categories", vector) for vector in vectors], axis=0)
        return Reading(float(scores[0]), float(scores[1:].max(initial=0.0)), sigmoid(categories))

    def logits(self, head: str, vector: Features) -> Floats:
        """One head's logits (1,) for one window; (C,) for ``categories``."""
        weights, biases = self.head(head)
        found: Floats = weights[:, fold(vector.indices, HEAD_BITS[head])] @ vector.values + biases
        return found

    def head(self, name: str) -> tuple[Floats, Floats]:
        """A head's weights (outputs, 2 x buckets) and biases (outputs,)."""
        return self._weights[name], self._biases[name]

    def _verdict(self, score: float, threshold: float, categories: Floats, refused: bool | None) -> Verdict:
        return Verdict(
            outcome=Outcome.UNSAFE if score >= threshold else Outcome.SAFE,
            score=score,
            threshold=threshold,
            categories=dict(zip(self.category_ids, map(float, categories), strict=True)),
            refused=refused,
            model_id=self.manifest.model_id,
        )


def read_item(item: ClassifyItem, name: str = "item") -> Conversation:
    """Bring an item into one form; ``name`` says which one it is in an error message.

    A conversation that ends with an assistant's turn is judged by that turn, with every user turn before it as
    prompt; one that ends with a user's turn is judged by its user turns. Other roles are not read.

    Raises:
        RequestError: the prompt is blank, or no user turn has any text.
    """
    if item.messages is None:
        prompt = item.prompt or ""
        if not prompt.strip():
            raise RequestError(f"{name}.prompt is empty; there is nothing to classify", param=f"{name}.prompt")
        return Conversation([prompt], item.response)
    turns = [turn for turn in item.messages if turn.role in ("user", "assistant")]
    response = _text(turns.pop()) if turns and turns[-1].role == "assistant" else None
    prompts = [_text(turn) for turn in turns if turn.role == "user" and _text(turn).strip()]
    if not prompts:
        raise RequestError(f"{name}.messages has no user turn with text", param=f"{name}.messages")
    return Conversation(prompts, response)


def readable(text: str) -> bool:
    """Whether the text has words, or so few symbols that there is nothing to read."""
    return bool(words(normalise(text))) or len("".join(text.split())) <= MAX_SYMBOLS


def _text(turn: ChatMessage) -> str:
    return turn.content or ""


def _windows(text: str) -> list[list[str]]:
    return list(windows(words(normalise(text))))
