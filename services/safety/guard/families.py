"""Families of guard models: how each is asked about a conversation, and how its answer is read.

Most families bring their own prompt, a chat template that the model server (or the local tokenizer) applies: they
are sent the conversation as it is. The wording of the others, and of ShieldGemma's guidelines, is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from services.contracts.errors import ConfigError
from services.contracts.hazards import HazardCategory as Hazard
from services.safety.guard import parsing
from services.safety.guard.parsing import Answer, Finding
from services.safety.guard.prompts import (
    GENERIC_PROMPT,
    GENERIC_RESPONSE,
    GUIDELINES,
    WILDGUARD_TEMPLATE,
    Turn,
    exchange,
    filled,
    is_usable_template,
    of_response,
)


@dataclass(frozen=True)
class Ask:
    """One request to a guard model.

    Args:
        messages: what its chat template is given.
        max_tokens: the longest answer; one that is cut off is not read, unless ``needs_end`` is False.
        needs_end: the answer has to be complete.
        template_options: extra variables for the chat template.
        generation_prompt: the chat template adds the beginning of an answer.
        hazards: what the request asks about, where it is not all hazards.
    """

    messages: tuple[Turn, ...]
    max_tokens: int
    needs_end: bool = True
    template_options: Mapping[str, Any] = field(default_factory=dict)
    generation_prompt: bool = True
    hazards: tuple[Hazard, ...] = ()


class Family(Protocol):
    """What a family knows. A conversation alternates, begins with the user, and its last turn is the one judged."""

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:
        """The requests that judge a conversation; the highest score of their answers counts."""
        ...

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:
        """The meaning of one answer; raises Unreadable when it is not in the documented form."""
        ...


@dataclass(frozen=True)  # its repr is part of the guard's identity, so it must not be an address
class LlamaGuard:
    """Llama Guard 3 (1B, 8B) and 4: hazards S1..S14 with the same ids as ours. Llama Guard 1 and 2 number differently.

    Sources: https://huggingface.co/meta-llama/Llama-Guard-3-8B, https://huggingface.co/meta-llama/Llama-Guard-4-12B.
    """

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:  # noqa: D102  # Family says it
        return [Ask(tuple(turns), max_tokens=80)]  # every category at once takes about 60 tokens

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:  # noqa: D102  # Family says it
        return parsing.llama_guard(answer)


@dataclass(frozen=True)
class Qwen3Guard:
    """Qwen3Guard-Gen: three labels; ``strict`` counts Controversial as unsafe, the loose reading does not.

    A category covers more than the one hazard it is mapped to: it is the nearest. Jailbreak is an attempt, not a
    hazard. Source: https://huggingface.co/Qwen/Qwen3Guard-Gen-8B.
    """

    strict: bool = True

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:  # noqa: D102  # Family says it
        return [Ask(tuple(turns), max_tokens=128)]

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:  # noqa: D102  # Family says it
        unsafe = ("Unsafe", "Controversial") if self.strict else ("Unsafe",)
        return parsing.qwen3guard(answer, of_response=of_response, unsafe=unsafe, categories=QWEN_CATEGORIES)


QWEN_CATEGORIES = {
    "Violent": Hazard.VIOLENT_CRIMES,
    "Non-violent Illegal Acts": Hazard.NON_VIOLENT_CRIMES,
    "Sexual Content or Sexual Acts": Hazard.SEXUAL_CONTENT,
    "PII": Hazard.PRIVACY,
    "Suicide & Self-Harm": Hazard.SUICIDE_AND_SELF_HARM,
    "Unethical Acts": Hazard.HATE,
    "Politically Sensitive Topics": Hazard.ELECTIONS,
    "Copyright Violation": Hazard.INTELLECTUAL_PROPERTY,
}


@dataclass(frozen=True)
class ShieldGemma:
    """ShieldGemma: Yes or No to one guideline; the score is P(Yes) against P(No) as first token.

    One request per guideline and not one for all: the model was trained on single guidelines, each gives a score of its
    own, and since its template puts the guideline after the conversation, a server with prefix caching reads the
    conversation once. The guidelines follow the four harms that it was trained on, in our own words, and name the
    hazards that they cover; it has no score for the others. Source: https://huggingface.co/google/shieldgemma-2b.
    """

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:  # noqa: D102  # Family says it
        return [
            Ask(
                tuple(exchange(turns)),
                max_tokens=1,
                needs_end=False,
                template_options={"guideline": guideline.format(who="chatbot" if of_response(turns) else "prompt")},
                generation_prompt=False,  # the documented use reads what follows the template as it stands
                hazards=hazards,
            )
            for guideline, hazards in GUIDELINES
        ]

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:  # noqa: D102  # Family says it
        return parsing.shieldgemma(answer, ask.hazards)


@dataclass(frozen=True)
class WildGuard:
    """WildGuard: three lines on harmful request, refusal and harmful response; it has no categories.

    The model was trained on one exact instruction, which is its publishers' text: give it as ``template``, with
    ``{prompt}`` and ``{response}`` where they belong. The default asks for the same lines in our own words, and suits
    general instruct models better than WildGuard. Source: https://huggingface.co/allenai/wildguard.
    """

    template: str | None = None

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:  # noqa: D102  # Family says it
        return [Ask((Turn("user", filled(self.template or WILDGUARD_TEMPLATE, turns)),), max_tokens=128)]

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:  # noqa: D102  # Family says it
        return parsing.wildguard(answer, of_response=of_response)


@dataclass(frozen=True)
class Generic:
    """Any instruct model, asked in our own words for ``no``, or ``yes`` with the ids of the hazards."""

    template: str | None = None

    def asks(self, turns: Sequence[Turn]) -> list[Ask]:  # noqa: D102  # Family says it
        template = self.template or (GENERIC_RESPONSE if of_response(turns) else GENERIC_PROMPT)
        return [Ask((Turn("user", filled(template, turns)),), max_tokens=80)]

    def read(self, ask: Ask, answer: Answer, *, of_response: bool) -> Finding:  # noqa: D102  # Family says it
        return parsing.yes_no(answer)


FAMILIES: dict[str, Family] = {
    "llama-guard": LlamaGuard(),
    "qwen3guard": Qwen3Guard(),
    "qwen3guard-loose": Qwen3Guard(strict=False),
    "shieldgemma": ShieldGemma(),
    "wildguard": WildGuard(),
    "generic": Generic(),
}


def load_family(name: str, template: Path | None = None) -> Family:
    """The family of that name, with the operator's own prompt if there is one.

    Raises:
        ConfigError: no such family, a template for a family that has its own, or an unusable template file.
    """
    if name not in FAMILIES:
        raise ConfigError(f"unknown guard family {name!r}; there are: {', '.join(FAMILIES)}", param="guard_family")
    family = FAMILIES[name]
    if template is None:
        return family
    if not isinstance(family, WildGuard | Generic):
        raise ConfigError(f"guard family {name} uses the model's own chat template; drop the template file")
    try:
        text = template.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{template}: cannot read the guard template: {error}", param="guard_template") from error
    if not is_usable_template(text):
        raise ConfigError(f"{template}: has neither {{conversation}} nor {{prompt}}", param="guard_template")
    return type(family)(text)
