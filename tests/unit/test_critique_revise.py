"""The main path and the comparison, with a model whose answers the test writes."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import pytest

from services.contracts.constitution import load_constitution
from services.contracts.critique import CritiqueItem, PreferItem, Revision
from services.contracts.errors import RequestError
from services.critique.backend import Letter, Text
from services.critique.prefer import prefer_answers
from services.critique.revise import choose_principles, revise_drafts
from services.critique.settings import DEFAULT_CONSTITUTION

ROOT = Path(__file__).parents[2]
CONSTITUTION = load_constitution(DEFAULT_CONSTITUTION)
REVISION = "I can't help with that, because it could hurt someone."
REVISED = Text(REVISION, "end")


class Scripted:
    """Answers critique requests, revision requests and questions with given functions; keeps what it was asked."""

    model_id = "scripted"

    def __init__(
        self,
        critique: Callable[[str], str] = lambda prompt: "Problem: it could hurt someone.",
        revision: Text = REVISED,
        letter: Callable[[str], Letter | None] = lambda prompt: "A",
    ) -> None:
        self._critique, self._revision, self._letter = critique, revision, letter
        self.asked: list[tuple[list[str], int]] = []

    async def ready(self) -> str | None:
        return None

    async def close(self) -> None:
        return None

    async def generate(self, prompts: Sequence[str], max_tokens: int) -> list[Text]:
        self.asked.append((list(prompts), max_tokens))
        return [self._revision if "Revision request:" in p else Text(self._critique(p), "end") for p in prompts]

    async def choose(self, prompts: Sequence[str]) -> list[Letter | None]:
        return [self._letter(prompt) for prompt in prompts]


def revise(model: Scripted, *items: CritiqueItem) -> list[Revision]:
    return asyncio.run(revise_drafts(items, CONSTITUTION, model, critique_tokens=10, revision_tokens=20))


def item(draft: str, prompt: str = "How do I do that?", principle_id: str | None = "no-crime") -> CritiqueItem:
    return CritiqueItem(prompt=prompt, draft=draft, principle_id=principle_id)


def test_drafts_with_a_problem_are_revised_and_others_kept_in_order() -> None:
    model = Scripted(lambda prompt: "Problem: bad." if "harm" in prompt else "No problem: fine.")
    kept, revised, kept_too = revise(model, item("Bread."), item("harm"), item("Cake."))
    assert [(r.revision, r.revised, r.rejected_because) for r in (kept, revised, kept_too)] == [
        ("Bread.", False, None),
        (REVISION, True, None),
        ("Cake.", False, None),
    ]
    assert (revised.critique.critique, revised.critique.problem) == ("Problem: bad.", True)
    assert (revised.critique.principle_id, revised.critique.model_id) == ("no-crime", "scripted")
    assert revised.critique.constitution_sha256 == CONSTITUTION.sha256


def test_revision_is_asked_for_with_the_critique_and_the_principles_wording() -> None:
    model = Scripted(lambda prompt: "Problem: bad.")
    revise(model, item("harm"))
    principle = CONSTITUTION.principle("no-crime")
    critique_prompt = f"Prompt: How do I do that?\nAnswer: harm\nCritique request: {principle.critique_request}"
    revision_prompt = (
        "Prompt: How do I do that?\nAnswer: harm\nCritique: Problem: bad.\n"
        f"Revision request: {principle.revision_request}"
    )
    assert model.asked == [([critique_prompt], 10), ([revision_prompt], 20)]


@pytest.mark.parametrize("critique", ["", "It is fine.", "Yes"])
def test_unreadable_critique_leads_to_a_revision(critique: str) -> None:
    (revision,) = revise(Scripted(lambda prompt: critique), item("Sure."))
    assert (revision.critique.problem, revision.revised, revision.revision) == (None, True, REVISION)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (Text("", "end"), "empty"),
        (Text("Sure.", "end"), "the same as the draft"),
        (Text(REVISION, "cut_off"), "cut off at the limit of tokens"),
        (Text("", "too_long"), "prompt, draft and critique do not fit the model's context"),
        (Text("I can't.\nPrompt: more", "end"), "contains the role marker 'Prompt:'"),
    ],
)
def test_unfit_revision_is_marked_and_never_replaced_by_the_draft(text: Text, reason: str) -> None:
    (revision,) = revise(Scripted(revision=text), item("Sure."))
    assert (revision.revised, revision.rejected_because) == (True, reason)


def test_nothing_is_asked_when_nothing_needs_revision() -> None:
    model = Scripted(lambda prompt: "No problem: fine.")
    revise(model, item("Bread."))
    assert model.asked[1] == ([], 20)


def test_principle_is_the_named_one_or_the_constitutions_choice() -> None:
    by_category = CritiqueItem(prompt="p", draft="d", categories=["S7"])
    free = CritiqueItem(prompt="p", draft="d")
    named, for_privacy, chosen = choose_principles([item("x"), by_category, free], CONSTITUTION)
    assert (named.id, for_privacy.id, chosen) == ("no-crime", "respect-privacy", CONSTITUTION.choose("p"))


def test_unknown_principle_is_a_request_error_that_names_the_item() -> None:
    with pytest.raises(RequestError, match=r"items.1.principle_id: no principle 'be-nice'; known: no-violence, "):
        choose_principles([item("x"), item("x", principle_id="be-nice")], CONSTITUTION)


@pytest.mark.parametrize(
    ("better", "preferred"),
    [("GOOD", "first"), ("BAD", "second"), ("Answer A", "unclear"), ("nothing", "unclear")],
)
def test_preference_counts_only_when_both_orders_agree(
    better: str, preferred: Literal["first", "second", "unclear"]
) -> None:
    """The model prefers the answer that contains ``better``; ``Answer A`` stands for a bias to the first place."""

    def letter(prompt: str) -> Letter | None:
        if better == "Answer A":
            return "A"
        return "A" if f"Answer A: {better}" in prompt else "B" if f"Answer B: {better}" in prompt else None

    pairs = [PreferItem(prompt="p", first="GOOD", second="BAD")] * 2
    preferences = asyncio.run(prefer_answers(pairs, CONSTITUTION, Scripted(letter=letter)))
    assert [p.preferred for p in preferences] == [preferred] * 2
    assert preferences[0].principle_id == CONSTITUTION.choose("p").id


def test_service_without_its_local_model_loads_no_torch() -> None:
    code = (
        "import sys, services.critique.__main__, services.critique.openai_model; "
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
