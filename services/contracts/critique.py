"""Contract of the critique service, and the wording of its three tasks.

The prompt wording stands here and not in the service because the miniature model is trained on exactly these
prompts: one function, so that the two cannot drift apart.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from services.contracts.constitution import Principle

PROBLEM = "Problem:"
NO_PROBLEM = "No problem:"


def critique_prompt(principle: Principle, prompt: str, draft: str) -> str:
    """Ask for a comment on ``draft``; the answer has to begin with ``Problem:`` or ``No problem:``."""
    return f"Prompt: {prompt}\nAnswer: {draft}\nCritique request: {principle.critique_request}"


def revision_prompt(principle: Principle, prompt: str, draft: str, critique: str) -> str:
    """Ask for a better answer in the light of ``critique``."""
    return f"Prompt: {prompt}\nAnswer: {draft}\nCritique: {critique}\nRevision request: {principle.revision_request}"


def preference_prompt(principle: Principle, prompt: str, first: str, second: str) -> str:
    """Ask which of two answers is better; the answer is ``A`` or ``B``."""
    return f"Prompt: {prompt}\nAnswer A: {first}\nAnswer B: {second}\nQuestion: {principle.preference_question}"


def finds_problem(critique: str) -> bool | None:
    """Read a critique's finding: True, False, or None when it begins with neither agreed phrase."""
    text = critique.strip().lower()
    if text.startswith(NO_PROBLEM.lower()):
        return False
    return True if text.startswith(PROBLEM.lower()) else None


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CritiqueItem(_Request):
    """A draft to comment on. Without ``principle_id`` the constitution chooses by prompt and categories."""

    prompt: str
    draft: str
    principle_id: str | None = None
    categories: list[str] = Field(default_factory=list)


class CritiqueRequest(_Request):
    """Body of ``POST /v1/critique``."""

    items: list[CritiqueItem] = Field(min_length=1)


class Critique(BaseModel):
    """A comment on a draft; ``problem`` is None when the model's text could not be read."""

    critique: str
    problem: bool | None
    principle_id: str
    constitution_sha256: str
    model_id: str


class CritiqueResponse(BaseModel):
    """Answer of ``POST /v1/critique``: one critique per item, in order."""

    critiques: list[Critique]


class ReviseRequest(_Request):
    """Body of ``POST /v1/revise``: the service critiques each draft, then revises it if need be."""

    items: list[CritiqueItem] = Field(min_length=1)


class Revision(BaseModel):
    """A draft's way through critique and revision.

    ``revision`` equals the draft when the critique found no problem. ``rejected_because`` is set when the model's
    revision failed a check (empty, leaked role markers, too long); such a revision must not be trained on.
    """

    revision: str
    revised: bool
    rejected_because: str | None = None
    critique: Critique


class ReviseResponse(BaseModel):
    """Answer of ``POST /v1/revise``: one revision per item, in order."""

    revisions: list[Revision]


class PreferItem(_Request):
    """Two answers to compare."""

    prompt: str
    first: str
    second: str
    principle_id: str | None = None
    categories: list[str] = Field(default_factory=list)


class PreferRequest(_Request):
    """Body of ``POST /v1/prefer``."""

    items: list[PreferItem] = Field(min_length=1)


class Preference(BaseModel):
    """Which answer is better; each pair is asked in both orders, and ``unclear`` means that the orders disagree."""

    preferred: Literal["first", "second", "unclear"]
    principle_id: str
    constitution_sha256: str
    model_id: str


class PreferResponse(BaseModel):
    """Answer of ``POST /v1/prefer``: one preference per item, in order."""

    preferences: list[Preference]
