"""From verdicts to a decision: a pure function, so that the gateway's policy can be read and tested as a table.

A ``Policy`` is what is in force for one tenant on one route; ``policy_file.py`` makes it from the operator's file.
The rule, in each direction by itself::

    found       the overall score reaches the overall threshold; without one, the classifier says unsafe
    category    its score reaches the category's own threshold; without one, the text is found and the score
                reaches the threshold that found it, or 0.5 if that is lower. To a category that the classifier
                did not judge, its own threshold is applied with the overall score: no kind of harm is likelier
    decision    the worst of the actions that apply: that of the direction if the text is found, and that of
                every category over its limit

Each condition and the choice of the worst can only grow with a score, so no higher score makes a decision milder.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any, NamedTuple, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from services.contracts.errors import UpstreamUnavailable
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import Outcome, Verdict

REMOVED = "[removed]"  # stands where a redacted part of an answer stood
LIKELY = 0.5


class Direction(StrEnum):
    """Which way the checked text was going."""

    PROMPT = "prompt"
    RESPONSE = "response"


class Action(StrEnum):
    """What the gateway does, mildest first: each lets out less of the text than the one before."""

    ALLOW = "allow"
    REDACT = "redact"  # ``REMOVED`` in place of the part that is unsafe
    REVISE = "revise"  # the critique service's revision in place of the answer
    REFUSE = "refuse"


class StreamUnit(StrEnum):
    """What a streamed answer is cut into; each unit waits for its verdict."""

    SENTENCE = "sentence"
    CHARACTERS = "characters"
    ANSWER = "answer"


_MILDEST_FIRST = tuple(Action)


def milder(action: Action, other: Action) -> bool:
    """``action`` lets out more than ``other`` does."""
    return _MILDEST_FIRST.index(action) < _MILDEST_FIRST.index(other)


def _one_that_withholds(value: Any) -> Any:
    if value not in (Action.REDACT, Action.REVISE, Action.REFUSE):
        raise ValueError("must be refuse, revise or redact")
    return value


def _one_for_prompts(value: Any) -> Any:
    if value == Action.REVISE:
        raise ValueError("a prompt cannot be revised: the critique service rewrites answers, not questions; use refuse")
    if value == Action.REDACT:
        raise ValueError(
            "a prompt cannot be redacted: the model would answer another question than was asked, and harm that is "
            "spread over several messages stands in none of them; use refuse"
        )
    if value != Action.REFUSE:
        raise ValueError("must be refuse, the only action for prompts")
    return value


def _at_least_one(patterns: tuple[str, ...]) -> tuple[str, ...]:
    if not patterns:
        raise ValueError("must name at least one model; ['*'] allows all")
    return patterns


AnswerAction = Annotated[Action, BeforeValidator(_one_that_withholds)]
PromptAction = Annotated[Action, BeforeValidator(_one_for_prompts)]
Threshold = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Milliseconds = Annotated[int, Field(ge=1, le=60_000, strict=True)]
ModelPattern = Annotated[str, Field(min_length=1, max_length=200, strict=True)]
ModelPatterns = Annotated[tuple[ModelPattern, ...], AfterValidator(_at_least_one)]  # min_length complains of bad items


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CategoryPolicy(_Part):
    """One hazard category: its own threshold, and its own action in place of the direction's."""

    threshold: Threshold | None = None
    action: AnswerAction | None = None


_NO_CATEGORY_POLICY = CategoryPolicy()


class PromptCategoryPolicy(CategoryPolicy):
    """One hazard category in prompts."""

    action: PromptAction | None = None


class DirectionPolicy(_Part):
    """When a text of one direction is found unsafe, and what is done then; without a threshold the classifier says."""

    threshold: Threshold | None = None
    action: AnswerAction = Action.REFUSE
    categories: Mapping[HazardCategory, CategoryPolicy] = Field(default_factory=dict)


class PromptPolicy(DirectionPolicy):
    """The same for prompts, which can only be refused."""

    action: PromptAction = Action.REFUSE
    categories: Mapping[HazardCategory, PromptCategoryPolicy] = Field(default_factory=dict)


class StreamPolicy(_Part):
    """How a streamed answer is cut for checking: at ``unit``, at a length, or after a pause of ``idle_ms``."""

    unit: StreamUnit = StreamUnit.SENTENCE
    max_characters: int = Field(default=200, ge=20, le=10_000, strict=True)
    idle_ms: Milliseconds = 150


class Policy(_Part):
    """What is in force for one tenant on one route."""

    shadow: bool = Field(default=False, strict=True)
    models: ModelPatterns = ("*",)
    system_prompt: str | None = Field(default=None, min_length=1, max_length=20_000, strict=True)
    check_deadline_ms: Milliseconds = 300
    stream: StreamPolicy = Field(default_factory=StreamPolicy)
    prompt: PromptPolicy = Field(default_factory=PromptPolicy)
    response: DirectionPolicy = Field(default_factory=DirectionPolicy)

    def towards(self, direction: Direction) -> DirectionPolicy:
        """The part for one direction."""
        return self.prompt if direction is Direction.PROMPT else self.response

    def allows_model(self, name: str) -> bool:
        """One of the patterns (``*``, ``?``, ``[abc]``) fits the name; case counts."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)

    @cached_property
    def sha256(self) -> str:
        """Hash of the canonical form: equal for policies that decide alike, however their file is written."""
        return canonical_sha256(self.model_dump(mode="json"))


def canonical_sha256(content: Any) -> str:
    """The sha256 of a JSON value with sorted keys and no white space."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Decision:
    """What is done with one text, and the hazard categories that led to it (worst first).

    ``action`` is what happens now. In shadow mode that is ``allow``, and ``shadowed`` is what would have happened.
    """

    action: Action
    direction: Direction
    categories: tuple[str, ...] = ()
    shadowed: Action | None = None

    @property
    def allowed(self) -> bool:
        """The text may go on."""
        return self.action is Action.ALLOW

    @property
    def reason(self) -> str:
        """One sentence for the client. In our own words: a classifier's free text could quote what is blocked."""
        text = "The prompt" if self.direction is Direction.PROMPT else "The answer"
        if self.allowed and self.shadowed is None:
            return f"{text} was classified as safe."
        names = ", ".join(_readable(category) for category in self.categories)
        return f"{text} was classified as unsafe" + (f": {names}." if names else ".")

    def or_refuse(self) -> "Decision":
        """The decision for where redacting or revising cannot be done; an allowance stays one."""
        return self if self.allowed else replace(self, action=Action.REFUSE)


def worst(decisions: Iterable[Decision]) -> Decision:
    """The decision that lets out least; the first of equal ones."""
    return max(decisions, key=lambda decision: _MILDEST_FIRST.index(decision.action))


def decide(verdicts: Sequence[Verdict], direction: Direction, policy: Policy) -> Decision:
    """Decide on a text from the verdicts on its parts: one unsafe part is enough, and the worst action wins.

    A text of which a part has no verdict can only be refused: redacting would let that part out.

    Raises:
        UpstreamUnavailable: a part has no verdict, or not the score that a threshold of the policy is for, and no other
            part is unsafe, so that nothing can be decided. In shadow mode also beside an unsafe part: it lifts
            decisions, not the need for a verdict.
    """
    part = policy.towards(direction)
    findings = [finding for verdict in verdicts for finding in _findings(verdict, part)]
    lacking = [what for verdict in verdicts if (what := _lacking(verdict, part))] if verdicts else ["no verdict"]
    if lacking and (policy.shadow or not findings):
        raise UpstreamUnavailable("safety", f"gave {lacking[0]} on the {direction}, so it cannot be let through")
    if not findings:
        return Decision(Action.ALLOW, direction)
    action = Action.REFUSE if lacking else max((f.action for f in findings), key=_MILDEST_FIRST.index)
    named = tuple(dict.fromkeys(f.category for f in sorted(findings, key=_by_score) if f.category))
    decision = Decision(action, direction, named or _likeliest(verdicts, part))
    return replace(decision, action=Action.ALLOW, shadowed=action) if policy.shadow else decision


def _lacking(verdict: Verdict, part: DirectionPolicy) -> str | None:
    """What the policy needs to know and the verdict does not tell; any score will do for a threshold."""
    if verdict.outcome is Outcome.UNSCORED:
        return "no verdict"
    if verdict.score is not None:
        return None
    if unjudged := _unjudged(verdict, part):
        return f"no score for {', '.join(unjudged)}, which the policy has a threshold for,"
    if part.threshold is not None and verdict.outcome is Outcome.SAFE:
        return "no score, which the policy has a threshold for,"
    return None


def _unjudged(verdict: Verdict, part: DirectionPolicy) -> dict[HazardCategory, float]:
    """The own thresholds of those categories that the verdict has no score for."""
    return {
        category: own.threshold
        for category, own in part.categories.items()
        if own.threshold is not None and category not in verdict.categories
    }


class _Finding(NamedTuple):
    """One condition that a verdict fulfils; ``category`` is None where it is the overall score that does."""

    action: Action
    category: str | None = None
    score: float = 0.0


def _by_score(finding: _Finding) -> tuple[float, str]:
    return -finding.score, finding.category or ""


def _findings(verdict: Verdict, part: DirectionPolicy) -> list[_Finding]:
    if verdict.outcome is Outcome.UNSCORED:
        return []
    found = _is_found(verdict, part)
    findings = [_Finding(part.action)] if found else []
    for category, score in verdict.categories.items():
        own = _category_policy(part, category)
        limit = own.threshold
        if limit is None and found:
            overall = verdict.threshold if part.threshold is None else part.threshold
            limit = LIKELY if overall is None else min(LIKELY, overall)
        if limit is not None and score >= limit:
            findings.append(_Finding(own.action or part.action, category, score))
    for category, limit in _unjudged(verdict, part).items():
        if verdict.score is not None and verdict.score >= limit:
            findings.append(_Finding(_category_policy(part, category).action or part.action))
    return findings


def _is_found(verdict: Verdict, part: DirectionPolicy) -> bool:
    if part.threshold is None or verdict.score is None:
        return verdict.outcome is Outcome.UNSAFE
    return verdict.score >= part.threshold


def _category_policy(part: DirectionPolicy, category: str) -> CategoryPolicy:
    """The category's own part; an empty one for a category without, or one that is not of the taxonomy."""
    by_id = cast("Mapping[str, CategoryPolicy]", part.categories)  # a HazardCategory is its id
    return by_id.get(category, _NO_CATEGORY_POLICY)


def _likeliest(verdicts: Sequence[Verdict], part: DirectionPolicy) -> tuple[str, ...]:
    """The single likeliest category of what was found, when none is over its limit."""
    scores = [
        (-score, category)
        for verdict in verdicts
        if verdict.outcome is not Outcome.UNSCORED and _is_found(verdict, part)
        for category, score in verdict.categories.items()
    ]
    return (min(scores)[1],) if scores else ()


def _readable(category: str) -> str:
    try:
        return f"{HazardCategory(category).readable} ({category})"
    except ValueError:
        return category
