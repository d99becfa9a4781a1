"""The release gate, and promotion of an adapter that passes it.

``check_gate`` is a pure function on two evaluation summaries; ``promote`` acts on its result.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.common.http import ServiceClient
from services.contracts.adapters import ActivateRequest, AdapterInfo, LoadAdapterRequest, Release
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError, GateRefused
from trainer.registry import copy_adapter


class _Figures(BaseModel):
    model_config = ConfigDict(extra="allow")  # what the gate does not read goes into the manifest all the same


class SafeShare(_Figures):
    """The share of safe answers to harmful prompts, with its 95 % interval."""

    n: int = Field(ge=1)
    safe_rate: float = Field(ge=0, le=1)
    low: float
    high: float


class RefusedShare(_Figures):
    """The share of harmless prompts that were refused, with its 95 % interval."""

    n: int = Field(ge=1)
    refusal_rate: float = Field(ge=0, le=1)
    low: float
    high: float


class EvaluationSummary(_Figures):
    """The figures of an evaluation that the gate reads."""

    advbench: SafeShare
    benign_out_of_source: RefusedShare
    benign_alarming: RefusedShare


class GateBounds(NamedTuple):
    """What an adapter has to reach.

    ``min_safe_rate`` is compared with the interval's lower end, so a small sample cannot prove safety by luck.
    ``max_over_refusal_increase`` is compared with the point estimates' difference to the baseline.
    """

    min_safe_rate: float
    max_over_refusal_increase: float


def check_gate(candidate: EvaluationSummary, baseline: EvaluationSummary, bounds: GateBounds) -> None:
    """Let an adapter pass or raise GateRefused, naming each figure, its interval and the bound it breaks."""
    refusals = []
    safety = candidate.advbench
    if safety.low < bounds.min_safe_rate:
        refusals.append(
            f"advbench safe_rate is {safety.safe_rate:.3f} (n={safety.n}), and the lower end of its interval, "
            f"{safety.low:.3f}, is below min-safe-rate={bounds.min_safe_rate:.3f}"
        )
    for name in ("benign_out_of_source", "benign_alarming"):
        now: RefusedShare = getattr(candidate, name)
        before: RefusedShare = getattr(baseline, name)
        increase = now.refusal_rate - before.refusal_rate
        if increase > bounds.max_over_refusal_increase:
            refusals.append(
                f"{name} refusal_rate rose from {before.refusal_rate:.3f} to {now.refusal_rate:.3f} "
                f"(interval {now.low:.3f} to {now.high:.3f}, n={now.n}), which is {increase:.3f} and more than "
                f"max-over-refusal-increase={bounds.max_over_refusal_increase:.3f}"
            )
    if refusals:
        raise GateRefused("; ".join(refusals))


def promote(
    adapter: Path,
    evaluation: Path,
    baseline: Path,
    release_dir: Path,
    bounds: GateBounds,
    inference: ServiceClient,
) -> Release:
    """Pass an adapter through the gate, write its release copy, and have the inference service serve it.

    Args:
        adapter: the adapter directory that was evaluated.
        evaluation: its evaluation summary (JSON).
        baseline: the evaluation summary of what is compared with, usually the untouched base model.
        release_dir: where release copies are kept, one folder per adapter.
        bounds: the gate's bounds.
        inference: the inference service; it has to see ``release_dir`` under the same path.

    Raises:
        GateRefused: a figure is worse than its bound; nothing was written or activated.
        AdapterError: the adapter is incomplete or has another hash than its manifest says.
        UpstreamError: the inference service did not load or activate it; the copy is kept.
    """
    summary = read_summary(evaluation)
    check_gate(summary, read_summary(baseline), bounds)
    name = f"release-{adapter.resolve().parent.parent.name}-{adapter.resolve().name}"
    copy = (release_dir / name).resolve()
    manifest = copy_adapter(adapter, copy, summary.model_dump(mode="json"))
    load = LoadAdapterRequest(lora_name=name, lora_path=str(copy), sha256=manifest.sha256)
    inference.post("/v1/load_lora_adapter", load, AdapterInfo)
    return inference.post("/v1/release", ActivateRequest(lora_name=name, sha256=manifest.sha256), Release)


def read_summary(path: Path) -> EvaluationSummary:
    """Read an evaluation summary; raises ConfigError naming the file and what is missing in it."""
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return EvaluationSummary.model_validate(values)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error.msg}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: not an evaluation summary: {describe(error)}") from error
