"""Curation: a client classifies its own shard before it trains on it, and deals with what is unsafe.

Only the services of the client's own silo see the pairs. A pair that could not be scored counts as unsafe. When the
safety service cannot be reached, curation fails: a client never trains on unfiltered data that was to be filtered.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from services.common.http import ServiceClient
from services.common.logs import get_logger
from services.contracts.critique import CritiqueItem, ReviseRequest, ReviseResponse, Revision
from services.contracts.errors import ConfigError, UpstreamUnavailable
from services.contracts.verdicts import (
    ClassifierInfo,
    ClassifyItem,
    ClassifyRequest,
    ClassifyResponse,
    Outcome,
    Verdict,
)
from trainer.files import make_dir, write_atomically
from trainer.shards import Pair

Mode = Literal["drop", "replace", "revise"]
Item = TypeVar("Item")

CLASSIFY_BATCH = 32
REVISE_BATCH = 32
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request, because it could hurt someone.",
    "I'm not able to help with that. I would be glad to help with something safe instead.",
    "Sorry, I won't help with this. It could cause harm.",
)


class CurationReport(BaseModel):
    """What became of one shard. Only these counts leave the client.

    ``kept`` + ``dropped`` + ``replaced`` + ``revised`` = ``total``; an ``unscored`` pair is among the dropped.
    The last three compare the classifier with the labels, where pairs have any: *flagged* means unsafe or unscored.
    """

    model_config = ConfigDict(frozen=True)

    total: int = 0
    kept: int = 0
    dropped: int = 0
    replaced: int = 0
    revised: int = 0
    unscored: int = 0
    harmful_flagged: int = 0
    harmful_passed: int = 0
    harmless_flagged: int = 0

    def __add__(self, other: "CurationReport") -> "CurationReport":
        theirs = other.model_dump()
        return CurationReport(**{name: count + theirs[name] for name, count in self.model_dump().items()})

    @property
    def precision(self) -> float | None:
        """Of the flagged pairs with a label, the share that is harmful; None when nothing was flagged."""
        flagged = self.harmful_flagged + self.harmless_flagged
        return self.harmful_flagged / flagged if flagged else None

    @property
    def recall(self) -> float | None:
        """Of the harmful pairs, the share that was flagged; None when the labels name no harmful pair."""
        harmful = self.harmful_flagged + self.harmful_passed
        return self.harmful_flagged / harmful if harmful else None


class CuratedShard(BaseModel):
    """A shard that is fit for training, with the classifier that judged it."""

    model_config = ConfigDict(frozen=True)

    pairs: tuple[Pair, ...]
    report: CurationReport
    filter_model_id: str
    filter_model_sha256: str


class ConstitutionInfo(BaseModel):
    """The part of ``GET /v1/constitution`` that decides whether a curated shard is still good."""

    sha256: str


class Treated(NamedTuple):
    """One pair after curation; ``pair`` is None when it was dropped."""

    pair: Pair | None
    outcome: Literal["kept", "dropped", "replaced", "revised"]


def curate(
    pairs: Sequence[Pair], mode: Mode, safety: ServiceClient, critique: ServiceClient | None
) -> tuple[list[Pair], CurationReport]:
    """Classify every pair and treat the unsafe ones.

    Args:
        pairs: the shard.
        mode: ``drop`` unsafe pairs, ``replace`` their answers by a refusal, or have them ``revise``d.
        safety: the silo's safety service.
        critique: the silo's critique service; needed for ``revise`` only.

    Raises:
        UpstreamError: a service failed for good; nothing may be trained on.
    """
    verdicts = classify(pairs, safety)
    unsafe = [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.outcome is Outcome.UNSAFE]
    treated = iter(treat(unsafe, mode, safety, critique))
    results = []
    for pair, verdict in zip(pairs, verdicts, strict=True):
        match verdict.outcome:
            case Outcome.SAFE:
                results.append(Treated(pair, "kept"))
            case Outcome.UNSAFE:
                results.append(next(treated))
            case Outcome.UNSCORED:
                results.append(Treated(None, "dropped"))
    return [result.pair for result in results if result.pair is not None], count(pairs, verdicts, results)


def classify(pairs: Sequence[Pair], safety: ServiceClient) -> list[Verdict]:
    """One verdict per pair, in order; raises UpstreamError."""
    verdicts: list[Verdict] = []
    for batch in _batches(pairs, CLASSIFY_BATCH):
        items = [ClassifyItem(prompt=pair.prompt, response=pair.response) for pair in batch]
        answer = safety.post("/v1/classify", ClassifyRequest(items=items), ClassifyResponse)
        verdicts.extend(_as_many(safety, answer.verdicts, batch))
    return verdicts


def treat(unsafe: Sequence[Pair], mode: Mode, safety: ServiceClient, critique: ServiceClient | None) -> list[Treated]:
    """Drop, replace or revise pairs that were found unsafe; raises UpstreamError."""
    if mode == "drop":
        return [Treated(None, "dropped") for _ in unsafe]
    if mode == "replace":
        return [Treated(_answered(pair, refusal_for(pair.prompt)), "replaced") for pair in unsafe]
    if critique is None:
        raise ValueError("curation mode 'revise' needs the critique service")
    return revise(unsafe, safety, critique)


def revise(unsafe: Sequence[Pair], safety: ServiceClient, critique: ServiceClient) -> list[Treated]:
    """Have unsafe pairs revised; a revision that failed its checks, or is still not safe, is dropped."""
    revisions: list[Revision] = []
    for batch in _batches(unsafe, REVISE_BATCH):
        items = [CritiqueItem(prompt=pair.prompt, draft=pair.response) for pair in batch]
        answer = critique.post("/v1/revise", ReviseRequest(items=items), ReviseResponse)
        revisions.extend(_as_many(critique, answer.revisions, batch))
    sound = {
        position: _answered(pair, revision.revision)
        for position, (pair, revision) in enumerate(zip(unsafe, revisions, strict=True))
        if revision.revised and revision.rejected_because is None
    }
    second = dict(zip(sound, classify(list(sound.values()), safety), strict=True))
    return [
        Treated(sound[position], "revised")
        if position in second and second[position].outcome is Outcome.SAFE
        else Treated(None, "dropped")
        for position in range(len(unsafe))
    ]


def refusal_for(prompt: str) -> str:
    """One of our refusals; the same prompt always gets the same one."""
    return random.Random(prompt).choice(REFUSALS)


def count(pairs: Sequence[Pair], verdicts: Sequence[Verdict], results: Sequence[Treated]) -> CurationReport:
    """Sum up one curation."""
    outcomes = [result.outcome for result in results]
    flagged = [verdict.outcome is not Outcome.SAFE for verdict in verdicts]
    labels = [pair.harmful for pair in pairs]
    compared = list(zip(labels, flagged, strict=True))
    return CurationReport(
        total=len(pairs),
        kept=outcomes.count("kept"),
        dropped=outcomes.count("dropped"),
        replaced=outcomes.count("replaced"),
        revised=outcomes.count("revised"),
        unscored=sum(verdict.outcome is Outcome.UNSCORED for verdict in verdicts),
        harmful_flagged=compared.count((True, True)),
        harmful_passed=compared.count((True, False)),
        harmless_flagged=compared.count((False, True)),
    )


def curate_once(
    folder: Path,
    pairs: Sequence[Pair],
    mode: Mode,
    safety: ServiceClient,
    critique: ServiceClient | None,
    *,
    min_filter_recall: float,
) -> CuratedShard:
    """Curate a shard, or take the result from an earlier round.

    The result is kept in ``folder`` under a hash of everything it depends on: the pairs, the mode, the classifier
    with its thresholds, and the constitution. It holds client data, so ``folder`` has to be the client's own.

    Raises:
        UpstreamError: a service failed for good, or the classifier was exchanged meanwhile.
        ConfigError: the folder cannot be written to, or the classifier is known to find too little.
    """
    info = safety.get("/v1/model", ClassifierInfo)
    require_recall(info, min_filter_recall)
    constitution = critique.get("/v1/constitution", ConstitutionInfo).sha256 if critique and mode == "revise" else ""
    key = hashlib.sha256()
    for part in (*(pair.model_dump_json() for pair in pairs), mode, info.model_dump_json(), constitution):
        key.update(part.encode() + b"\n")
    kept_result = make_dir(folder) / f"curated-{key.hexdigest()[:32]}.json"
    try:
        return CuratedShard.model_validate_json(kept_result.read_bytes())
    except (FileNotFoundError, ValidationError):
        pass  # not curated yet, or by an older version of this program
    kept, report = curate(pairs, mode, safety, critique)
    if safety.get("/v1/model", ClassifierInfo) != info:
        raise UpstreamUnavailable("safety", "the classifier was changed while the shard was being curated")
    shard = CuratedShard(
        pairs=tuple(kept), report=report, filter_model_id=info.model_id, filter_model_sha256=info.sha256
    )
    write_atomically(kept_result, shard.model_dump_json())
    return shard


def require_recall(info: ClassifierInfo, floor: float) -> None:
    """Refuse a classifier that its calibration shows to be blind: curating with it would only look safe.

    The recall on responses counts, for a shard's pairs have them; where it was not measured, that on prompts. Of a
    classifier without either nothing is known, which is logged and no reason to stop.

    Raises:
        ConfigError: the measured recall is below ``floor``.
    """
    calibration = info.calibration
    figures = {"responses": calibration.response, "prompts": calibration.prompt} if calibration else {}
    measured = {kind: found for kind, found in figures.items() if found and found.recall is not None}
    if calibration is None or not measured:
        get_logger().warning(
            "NOTHING IS KNOWN OF THE FILTER'S RECALL; measure it with `python -m services.safety calibrate`",
            model_id=info.model_id,
        )
        return
    kind, found = next(iter(measured.items()))
    if found.recall is not None and found.recall < floor:
        low, high = found.recall_interval or (0.0, 1.0)
        raise ConfigError(
            f"the filter {info.model_id} finds {found.recall:.1%} of unsafe {kind} (95 % interval {low:.1%} to "
            f"{high:.1%}, n={found.unsafe}) on {calibration.data} (sha256 {calibration.data_sha256[:12]}), which is "
            f"below min-filter-recall={floor}: choose its thresholds on your data (`python -m services.safety "
            "calibrate`), tune it (`python -m services.safety tune`), or lower min-filter-recall",
            param="min-filter-recall",
        )


def _answered(pair: Pair, response: str) -> Pair:
    """The pair with another answer, which is no longer what its label was about."""
    return pair.model_copy(update={"response": response, "harmful": None})


def _as_many(client: ServiceClient, answers: list[Item], asked: Sequence[object]) -> list[Item]:
    if len(answers) != len(asked):
        raise UpstreamUnavailable(client.upstream, f"answered {len(answers)} results for {len(asked)} items")
    return answers


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
