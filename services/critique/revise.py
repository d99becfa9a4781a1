"""The main path: choose a principle, critique the draft, revise it if need be, check the revision.

Constitutional AI's supervised stage (arXiv 2212.08073, section 3.1), one critique and one revision for each draft.
"""

from collections.abc import Sequence

from services.contracts.constitution import Constitution, Principle
from services.contracts.critique import (
    Critique,
    CritiqueItem,
    PreferItem,
    Revision,
    critique_prompt,
    finds_problem,
    revision_prompt,
)
from services.contracts.errors import RequestError
from services.critique.backend import Text, TextModel
from services.critique.checks import tidy, why_rejected


async def critique_drafts(
    items: Sequence[CritiqueItem], constitution: Constitution, model: TextModel, max_tokens: int
) -> list[Critique]:
    """Comment on each draft under one principle."""
    principles = choose_principles(items, constitution)
    prompts = [critique_prompt(p, item.prompt, item.draft) for p, item in zip(principles, items, strict=True)]
    texts = await model.generate(prompts, max_tokens)
    return [
        Critique(
            critique=text.text.strip(),
            problem=finds_problem(text.text),
            principle_id=principle.id,
            constitution_sha256=constitution.sha256,
            model_id=model.model_id,
        )
        for principle, text in zip(principles, texts, strict=True)
    ]


async def revise_drafts(
    items: Sequence[CritiqueItem],
    constitution: Constitution,
    model: TextModel,
    *,
    critique_tokens: int,
    revision_tokens: int,
) -> list[Revision]:
    """Critique each draft, and revise those in which a problem was found.

    A critique that cannot be read counts as a problem: an unclear critique must not let a draft through. A draft
    whose revision fails a check keeps ``revised`` and gets ``rejected_because``; its text is for inspection only.
    """
    critiques = await critique_drafts(items, constitution, model, critique_tokens)
    suspect = [index for index, critique in enumerate(critiques) if critique.problem is not False]
    prompts = [_ask_for_revision(items[index], critiques[index], constitution) for index in suspect]
    texts = dict(zip(suspect, await model.generate(prompts, revision_tokens), strict=True))
    return [
        _checked(item.draft, critique, texts.get(index))
        for index, (item, critique) in enumerate(zip(items, critiques, strict=True))
    ]


def choose_principles(items: Sequence[CritiqueItem | PreferItem], constitution: Constitution) -> list[Principle]:
    """Each item's principle: the one it names, or the constitution's choice for its prompt and categories.

    Raises:
        RequestError: an item names a principle that the constitution does not have.
    """
    known = {principle.id: principle for principle in constitution.principles}
    for index, item in enumerate(items):
        if item.principle_id is not None and item.principle_id not in known:
            param = f"items.{index}.principle_id"
            raise RequestError(f"{param}: no principle {item.principle_id!r}; known: {', '.join(known)}", param=param)
    return [
        known[item.principle_id] if item.principle_id else constitution.choose(item.prompt, item.categories)
        for item in items
    ]


def _ask_for_revision(item: CritiqueItem, critique: Critique, constitution: Constitution) -> str:
    return revision_prompt(constitution.principle(critique.principle_id), item.prompt, item.draft, critique.critique)


def _checked(draft: str, critique: Critique, text: Text | None) -> Revision:
    if text is None:
        return Revision(revision=draft, revised=False, critique=critique)
    revision = tidy(text.text)
    rejected_because = why_rejected(revision, draft, text.ending)
    return Revision(revision=revision, revised=True, rejected_because=rejected_because, critique=critique)
