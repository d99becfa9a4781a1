"""Comparing two answers under a principle, in both orders.

Models favour one position (arXiv 2306.05685, section 3.3), so each pair is asked twice with the answers swapped; a
preference counts only when both orders agree.
"""

from collections.abc import Sequence
from typing import Literal

from services.contracts.constitution import Constitution
from services.contracts.critique import Preference, PreferItem, preference_prompt
from services.critique.backend import Letter, TextModel
from services.critique.revise import choose_principles


async def prefer_answers(items: Sequence[PreferItem], constitution: Constitution, model: TextModel) -> list[Preference]:
    """Which answer of each pair is better, by the principle's preference question."""
    principles = choose_principles(items, constitution)
    pairs = list(zip(principles, items, strict=True))
    asked = [preference_prompt(p, item.prompt, item.first, item.second) for p, item in pairs]
    swapped = [preference_prompt(p, item.prompt, item.second, item.first) for p, item in pairs]
    letters = await model.choose([*asked, *swapped])
    return [
        Preference(
            preferred=_agreed(letters[index], letters[index + len(items)]),
            principle_id=principle.id,
            constitution_sha256=constitution.sha256,
            model_id=model.model_id,
        )
        for index, principle in enumerate(principles)
    ]


def _agreed(letter: Letter | None, swapped: Letter | None) -> Literal["first", "second", "unclear"]:
    if (letter, swapped) == ("A", "B"):
        return "first"
    return "second" if (letter, swapped) == ("B", "A") else "unclear"
