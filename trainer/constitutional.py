"""The constitutional stage: align the aggregated adapter with the constitution, on the coordinator.

The aggregated model drafts answers to red-team prompts, the critique service comments on each draft and revises it,
and the adapter is trained for a few steps on the revisions, so that the next round starts from an aligned model.
This is the light stage of arXiv 2502.16691 (50 iterations a round), with critique and revision after arXiv 2212.08073.
All prompts are the coordinator's own: no client data is seen here.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pydantic import BaseModel

from services.common.http import ServiceClient
from services.contracts.adapters import AdapterInfo, LoadAdapterRequest, UnloadAdapterRequest
from services.contracts.critique import CritiqueItem, ReviseRequest, ReviseResponse, Revision
from services.contracts.errors import DataError, UpstreamUnavailable
from trainer.aggregation import Arrays
from trainer.batching import encode_pairs
from trainer.config import B_ONLY, RunConfig
from trainer.drafts import draft_answers
from trainer.files import make_dir, write_atomically
from trainer.local_rules import LocalRule
from trainer.model import Trainee, adapter_config_json, read_adapter_arrays, set_adapter_arrays
from trainer.records import ConstitutionalReport
from trainer.registry import write_adapter
from trainer.sft import train_sft
from trainer.shards import Pair, Prompt, read_jsonl, read_pairs

REVISE_BATCH = 32


class Prompts(NamedTuple):
    """The prompts of one round, and the benign pairs that are replayed with them."""

    red_team: list[str]
    benign: list[str]
    replay: list[Pair]


class Kept(BaseModel):
    """One line of ``cai/round-N.jsonl``: a draft, what became of it, and why."""

    prompt: str
    red_team: bool
    draft: str
    revision: Revision
    trained_on: bool
    reason: str

    @property
    def pair(self) -> Pair:
        """What to train on: the draft itself when the critique found no problem with it."""
        return Pair(prompt=self.prompt, response=self.revision.revision)


def align(
    trainee: Trainee, arrays: Arrays, config: RunConfig, round_number: int, provenance: dict[str, Any]
) -> tuple[Arrays, ConstitutionalReport]:
    """Run the constitutional stage on an aggregated adapter.

    Args:
        trainee: the coordinator's model; its adapter is overwritten.
        arrays: the aggregated adapter.
        config: the run's settings; an arm with the constitutional stage.
        round_number: the round, which seeds the choice of prompts and the order of the data.
        provenance: the manifest's fields for the temporary copy that the inference service loads.

    Returns:
        The aligned adapter (the given one, when no draft and no revision was fit for training) and the counts.

    Raises:
        UpstreamError: the inference or the critique service failed for good.
        DataError: the prompts cannot be read, or the replay pairs are not all benign.
    """
    prompts = choose_prompts(config, round_number)
    with served_adapter(config, trainee, arrays, round_number, provenance) as model:
        drafts = _draft(prompts.red_team + prompts.benign, model, config)
    revisions = _revise(prompts.red_team + prompts.benign, drafts, config)
    kept = [
        select(prompt, draft, revision, red_team=position < len(prompts.red_team))
        for position, (prompt, draft, revision) in enumerate(
            zip(prompts.red_team + prompts.benign, drafts, revisions, strict=True)
        )
    ]
    lines = [line.model_dump_json() for line in kept]
    write_atomically(make_dir(config.run_dir / "cai") / f"round-{round_number}.jsonl", "\n".join(lines) + "\n")

    aligned = [line.pair for line in kept if line.trained_on]
    replayed = prompts.replay[: replay_count(len(aligned), config.cai_replay_share)]
    losses: tuple[float, ...] = ()
    loss = 0.0
    if aligned:
        set_adapter_arrays(trainee, arrays)
        result = train_sft(
            trainee,
            encode_pairs(aligned + replayed, trainee.tokenizer, config.max_length),
            steps=config.cai_steps,
            batch_size=config.cai_batch_size,
            learning_rate=config.cai_learning_rate,
            seed=config.seed + round_number,
            rule=LocalRule(b_only=config.strategy in B_ONLY),
        )
        losses, loss = result.losses, result.loss
        arrays = read_adapter_arrays(trainee)
    report = ConstitutionalReport(
        **count(kept), trained_on=len(aligned), replayed=len(replayed), steps=len(losses), loss=loss,
        constitution_sha256=revisions[0].critique.constitution_sha256,
    )  # fmt: skip
    return arrays, report


def choose_prompts(config: RunConfig, round_number: int) -> Prompts:
    """This round's prompts: a fresh sample each round, the same in every run of the same seed."""
    if config.red_team_data is None:
        raise ValueError("the constitutional stage needs red-team-data")
    generator = random.Random(f"{config.seed}:cai:{round_number}")
    red_team = [line.prompt for line in read_jsonl(config.red_team_data, Prompt)]
    if not red_team:
        raise DataError(f"{config.red_team_data}: holds no prompt")
    replay = [] if config.replay_data is None else read_pairs(config.replay_data, harmful=False)
    if any(pair.harmful for pair in replay):
        raise DataError(f"{config.replay_data}: holds pairs with harmful=true, and replay trains on pairs as they are")
    generator.shuffle(red_team)
    generator.shuffle(replay)
    probes = replay[: config.cai_benign_prompts]
    rest = replay[config.cai_benign_prompts :]
    return Prompts(red_team[: config.cai_prompts], [pair.prompt for pair in probes], rest)


def select(prompt: str, draft: str, revision: Revision, *, red_team: bool) -> Kept:
    """Decide whether a revision is trained on, and say why.

    A benign prompt is there to count the critique's false alarms: training on such revisions would teach the model
    to refuse what is harmless.
    """
    if not red_team:
        trained_on, reason = False, "benign probe"
    elif revision.rejected_because is not None:
        trained_on, reason = False, f"revision rejected: {revision.rejected_because}"
    elif revision.revised:
        trained_on, reason = True, "revised"
    elif revision.critique.problem is None:
        trained_on, reason = False, "critique unreadable"
    elif not draft.strip():
        trained_on, reason = False, "empty draft"
    else:
        trained_on, reason = True, "no problem found"
    return Kept(
        prompt=prompt, red_team=red_team, draft=draft, revision=revision, trained_on=trained_on, reason=reason
    )  # fmt: skip


def replay_count(aligned: int, share: float) -> int:
    """How many replay pairs make up ``share`` of the mixture with ``aligned`` others."""
    return round(aligned * share / (1 - share))


def count(kept: Sequence[Kept]) -> dict[str, int]:
    """The counts of one stage that the report shows."""
    red_team = [line for line in kept if line.red_team]
    benign = [line for line in kept if not line.red_team]
    revised = sum(line.trained_on and line.revision.revised for line in red_team)
    no_problem = sum(line.trained_on and not line.revision.revised for line in red_team)
    return {
        "drafts": len(red_team),
        "revised": revised,
        "no_problem": no_problem,
        "rejected": len(red_team) - revised - no_problem,
        "benign_drafts": len(benign),
        "benign_flagged": sum(line.revision.critique.problem is True for line in benign),
    }


@contextmanager
def served_adapter(
    config: RunConfig, trainee: Trainee, arrays: Arrays, round_number: int, provenance: dict[str, Any]
) -> Iterator[str]:
    """Have the inference service serve an adapter for a while; yields the model name to ask for."""
    directory = (config.run_dir / "adapters" / f"aggregated-{round_number}").resolve()
    fields = {**provenance, "round_number": round_number}
    manifest = write_adapter(directory, arrays, adapter_config_json(trainee), fields)
    name = f"cai-round-{round_number}-{manifest.sha256[:12]}"
    load = LoadAdapterRequest(lora_name=name, lora_path=str(directory), sha256=manifest.sha256)
    try:
        with _service("inference", config.inference_url, config) as inference:
            inference.post("/v1/load_lora_adapter", load, AdapterInfo)
            try:
                yield name
            finally:
                inference.post("/v1/unload_lora_adapter", UnloadAdapterRequest(lora_name=name), AdapterInfo)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _draft(prompts: Sequence[str], model: str, config: RunConfig) -> list[str]:
    return draft_answers(
        prompts, url=str(config.inference_url), model=model, max_tokens=config.cai_answer_tokens, seed=config.seed,
        timeout_seconds=config.service_timeout_seconds,
    )  # fmt: skip


def _revise(prompts: Sequence[str], drafts: Sequence[str], config: RunConfig) -> list[Revision]:
    """Critique and revise each draft; the service chooses the principle by a hash of the prompt."""
    items = [CritiqueItem(prompt=prompt, draft=draft) for prompt, draft in zip(prompts, drafts, strict=True)]
    revisions: list[Revision] = []
    with _service("critique", config.coordinator_critique_url, config) as critique:
        for start in range(0, len(items), REVISE_BATCH):
            batch = items[start : start + REVISE_BATCH]
            answer = critique.post("/v1/revise", ReviseRequest(items=batch), ReviseResponse)
            if len(answer.revisions) != len(batch):
                raise UpstreamUnavailable("critique", f"{len(answer.revisions)} revisions for {len(batch)} drafts")
            revisions.extend(answer.revisions)
    return revisions


def _service(name: str, url: str | None, config: RunConfig) -> ServiceClient:
    return ServiceClient(name, str(url), timeout_seconds=config.service_timeout_seconds)
