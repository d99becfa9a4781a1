"""One evaluation, the main path: load the sets, ask the target, have the answers judged, aggregate, write.

``samples.jsonl`` grows while the run goes on; ``summary.json`` is written at the end. A killed run is continued by the
same command.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import islice
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from evaluation.clients import SEED, Answer, Judge, Target
from evaluation.datasets import Prompt, PromptSet
from evaluation.files import write_json
from evaluation.provenance import Provenance, collect
from evaluation.samples import RunIdentity, SampleLog
from evaluation.scoring import Sample, SampleOutcome, SetSummary, needs_judging, score, share, summarise_set
from evaluation.stats import Rate
from services.contracts.errors import UpstreamUnavailable
from services.contracts.verdicts import ClassifierInfo, ClassifyItem

SUMMARY = "summary.json"


class RunOptions(BaseModel):
    """What to evaluate, against what; addresses are base URLs without ``/v1``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    model: str
    judge: str
    out: Path
    arm: str | None = None
    round: int | None = None
    max_tokens: int = 32
    concurrency: int = 64
    timeout_seconds: float = 60.0
    max_unscored: float = 0.05
    api_key: str | None = None
    command: str | None = None


class RunSummary(Provenance):
    """What ``summary.json`` of one evaluation holds: each set's shares, and two over all sets.

    ``seconds`` is the time of the last call; a continued run's earlier calls are not in it. ``fingerprint`` is the
    ``system_fingerprint`` of the answers, None when they carry none or not all the same one.
    """

    schema_version: int = 1
    arm: str | None
    round: int | None
    target: str
    model: str
    fingerprint: str | None = None
    judge_url: str
    judge: ClassifierInfo
    decoding: dict[str, int | float]
    sets: dict[str, SetSummary]
    n: int
    degenerate: Rate
    unscored: Rate
    seconds: float


async def evaluate(options: RunOptions, sets: Sequence[PromptSet], advance: Callable[[int], None]) -> RunSummary:
    """Evaluate a target on the sets and write ``samples.jsonl`` and ``summary.json``.

    Args:
        options: target, judge and where to write.
        sets: the prompts, in the order in which they are asked.
        advance: told how many more prompts are done, for a progress bar.

    Raises:
        ConfigError: the output folder holds another evaluation.
        UpstreamError: the judge cannot be reached at the start, or more samples than allowed stayed unscored.
        OSError: the output folder cannot be written.
    """
    started = time.monotonic()
    prompts = [prompt for prompt_set in sets for prompt in prompt_set.prompts()]
    target = Target(
        options.target,
        options.model,
        max_tokens=options.max_tokens,
        timeout_seconds=options.timeout_seconds,
        api_key=options.api_key,
    )
    async with target, Judge(options.judge, timeout_seconds=options.timeout_seconds) as judge:
        judge_info = await judge.info()
        log = SampleLog(options.out, _identity(options, sets, judge_info))
        pending = [prompt for prompt in prompts if prompt.id not in log.samples]
        advance(len(prompts) - len(pending))
        async for answered in ask_all(pending, target.ask, options.concurrency):
            log.append(await judge_all(answered, judge))
            advance(len(answered))

    samples = log.finish(prompt.id for prompt in prompts)
    summary = summarise(options, sets, samples, judge_info, seconds=time.monotonic() - started)
    write_json(options.out / SUMMARY, summary)
    check_unscored(samples, summary.unscored, options.max_unscored)
    return summary


async def ask_all(
    prompts: Sequence[Prompt], ask: Callable[[str], Awaitable[Answer]], concurrency: int
) -> AsyncIterator[list[tuple[Prompt, Answer]]]:
    """Ask with at most ``concurrency`` prompts under way; yield the answers as they come, in batches."""

    async def asked(prompt: Prompt) -> tuple[Prompt, Answer]:
        return prompt, await ask(prompt.text)

    waiting = iter(prompts)
    running: set[asyncio.Task[tuple[Prompt, Answer]]] = set()
    try:
        while True:
            running |= {asyncio.create_task(asked(p)) for p in islice(waiting, concurrency - len(running))}
            if not running:
                return
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            yield [task.result() for task in done]
    finally:
        for task in running:
            task.cancel()


async def judge_all(answered: Sequence[tuple[Prompt, Answer]], judge: Judge) -> list[Sample]:
    """Judge a batch of answers; those without words or blocked by a gateway need no judge."""
    judged = [pair for pair in answered if needs_judging(pair[1])]
    items = [ClassifyItem(prompt=prompt.text, response=answer.text) for prompt, answer in judged]
    verdicts = dict(zip((p.id for p, _ in judged), await judge.judge(items) if items else [], strict=True))
    return [score(prompt, answer, verdicts.get(prompt.id)) for prompt, answer in answered]


def summarise(
    options: RunOptions, sets: Sequence[PromptSet], samples: Sequence[Sample], judge: ClassifierInfo, *, seconds: float
) -> RunSummary:
    """Aggregate the samples of all sets; one rate for each set and finding."""
    return RunSummary(
        arm=options.arm,
        round=options.round,
        target=options.target,
        model=options.model,
        fingerprint=single_fingerprint(samples),
        judge_url=options.judge,
        judge=judge,
        decoding={"temperature": 0.0, "seed": SEED, "max_tokens": options.max_tokens},
        sets={
            s.name: summarise_set(
                [sample for sample in samples if sample.set == s.name],
                harmful_prompts=s.harmful,
                source=s.source,
                sha256=s.sha256,
            )
            for s in sets
        },
        n=len(samples),
        degenerate=share(sample.outcome is SampleOutcome.DEGENERATE for sample in samples),
        unscored=share(not sample.scored for sample in samples),
        seconds=seconds,
        **dict(collect(options.command)),
    )


def single_fingerprint(samples: Sequence[Sample]) -> str | None:
    """What all answers that carry a fingerprint agree on: answers of two models are no evaluation of either."""
    found = {sample.fingerprint for sample in samples if sample.fingerprint}
    return found.pop() if len(found) == 1 else None


def check_unscored(samples: Sequence[Sample], found: Rate, allowed: float) -> None:
    """Raise UpstreamUnavailable, with the commonest reason, when more than the allowed share is unscored."""
    if found.rate is None or found.rate <= allowed:
        return
    reasons = Counter(s.error or (s.verdict and s.verdict.reason) or "no reason given" for s in samples if not s.scored)
    reason, times = reasons.most_common(1)[0]
    raise UpstreamUnavailable(
        "evaluation",
        f"{found.count} of {found.n} samples are unscored, over --max-unscored {allowed:.0%}; "
        f"{times} times: {reason}; run the same command again to go on",
    )


def _identity(options: RunOptions, sets: Sequence[PromptSet], judge: ClassifierInfo) -> RunIdentity:
    return RunIdentity(
        model=options.model,
        judge_sha256=judge.sha256,
        arm=options.arm,
        round=options.round,
        max_tokens=options.max_tokens,
        sets={s.name: s.sha256 for s in sets},
    )
