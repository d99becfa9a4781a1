"""What the critique service asks of a language model, and the two real ones behind it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from services.critique.settings import CritiqueSettings

Ending = Literal["end", "cut_off", "too_long"]
Letter = Literal["A", "B"]


class Text(NamedTuple):
    """A generated text and how it ended.

    ``cut_off``: the limit of tokens was reached. ``too_long``: the prompt does not fit the model's context, so that
    nothing was generated.
    """

    text: str
    ending: Ending


class TextModel(Protocol):
    """An instruct model; both methods take user prompts and answer in their order."""

    model_id: str

    async def generate(self, prompts: Sequence[str], max_tokens: int) -> list[Text]:
        """Answer each prompt with the most likely text."""

    async def choose(self, prompts: Sequence[str]) -> list[Letter | None]:
        """Answer each prompt with A or B; None when the model says neither."""

    async def ready(self) -> str | None:
        """None when the model can be asked, else the reason why it cannot."""

    async def close(self) -> None:
        """Let go of threads and connections; the last call."""


def load_model(settings: CritiqueSettings) -> TextModel:
    """The model that the settings name; raises ConfigError when it cannot be loaded."""
    if settings.backend == "openai":
        from services.critique.openai_model import OpenAIModel

        return OpenAIModel(settings)
    from services.critique.local_model import LocalModel

    return LocalModel(settings)
