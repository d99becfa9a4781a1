"""The configuration of one federated run, as Flower's ``run_config`` carries it.

The keys and their defaults stand in one place, ``[tool.flwr.app.config]`` of ``pyproject.toml``; here stand their
meaning and their limits. Flower has no null: the empty string means "not set".
"""

import difflib
import tomllib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from services.contracts.constitution import describe
from services.contracts.errors import ConfigError
from trainer.aggregation import MAX_WEIGHT

RunValue: TypeAlias = str | int | float | bool
OptionalPath = Annotated[Path | None, BeforeValidator(lambda value: None if value == "" else value)]
OptionalText = Annotated[str | None, BeforeValidator(lambda value: None if value == "" else value)]

# A silo decides these for itself (`flower-supernode --node-config`): where its data lies and who may see it.
DATA_KEYS = ("shard-data", "safety-url", "critique-url", "client-dir")
SILO_KEYS = (*DATA_KEYS, "base-model", "client-rank", "dp-delta", "dp-max-epsilon")
# These may change between a run and its continuation: they do not change what a finished round means.
OPERATIONAL_FIELDS = {
    "run_dir", "client_dir", "resume", "rounds", "safety_url", "critique_url", "coordinator_critique_url",
    "inference_url", "service_timeout_seconds", "round_timeout_seconds", "lost_node_seconds", "min_filter_recall",
    "client_rank", "dp_max_epsilon",
}  # fmt: skip

MAX_OWN_PAIRS = 10_000_000

StrategyName: TypeAlias = Literal[
    "fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold",
    "ffa-lora", "fedsvd", "flexlora", "fedex-lora", "flora",
    "median", "trimmed-mean", "krum", "multikrum", "bulyan",
]  # fmt: skip
SERVER_RATES = {"fedavgm": 1.0, "scaffold": 1.0, "fedadam": 1e-3, "fedyogi": 1e-3, "fedadagrad": 1e-3}
B_ONLY = ("ffa-lora", "fedsvd")  # clients train B and leave A as it is
RESIDUAL = ("fedex-lora", "flora")  # the last residual-rank components are not trained by clients
SEVERAL_RANKS = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "flexlora")
# Their aggregate is a function of the mean of the clients' changes, which clipping bounds.
PRIVATE = ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "ffa-lora", "fedsvd")
# Fewer updates than (this) * malicious-clients + (that) give a robust rule no guarantee.
ROBUST_NEEDS = {"median": (2, 1), "trimmed-mean": (2, 1), "krum": (2, 3), "multikrum": (2, 3), "bulyan": (4, 3)}


class Arm(StrEnum):
    """One experimental condition: which of the two safety stages run."""

    NONE = "none"
    FILTER = "filter"
    CAI = "cai"
    FILTER_CAI = "filter+cai"

    @property
    def filters(self) -> bool:
        """Whether the clients curate their shards before training."""
        return self in (Arm.FILTER, Arm.FILTER_CAI)

    @property
    def constitutional(self) -> bool:
        """Whether the coordinator aligns the aggregated adapter after each round."""
        return self in (Arm.CAI, Arm.FILTER_CAI)


class RunConfig(BaseModel):
    """All settings of a run. Field names are the keys with ``_`` for ``-``."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, alias_generator=lambda name: name.replace("_", "-")
    )

    run_dir: Path = Field(description="where the coordinator writes rounds.jsonl, adapters and its state")
    client_dir: OptionalPath = Field(description="where a client keeps its curated shard; run-dir/clients when not set")
    resume: bool = Field(description="continue after the last finished round of the same configuration")
    arm: Arm
    seed: int = Field(description="seeds LoRA's initial weights, client sampling and the order of the data")
    split_seed: int = Field(description="seeds how pairs are dealt to clients")

    num_clients: int = Field(ge=1)
    clients_per_round: int = Field(ge=1)
    min_clients: int = Field(ge=1, description="fewer accepted updates than this end the run with an error")
    rounds: int = Field(ge=1)
    round_timeout_seconds: float = Field(gt=0, description="a client that has not answered by then failed the round")
    lost_node_seconds: float = Field(
        ge=0, description="a node that was killed or cut off has this long to come back; it is then asked again"
    )

    silo_data: bool = Field(
        description="every silo brings its own data (`--node-config shard-data`), and the coordinator names none"
    )
    shard_data: OptionalText = Field(description="own data: a JSONL path with {shard} for the client's number")
    benign_data: OptionalPath = Field(description="JSONL of benign pairs that are dealt to the clients")
    harmful_data: OptionalPath = Field(description="JSONL of harmful pairs that are dealt to the clients")
    harmful_share: float = Field(ge=0, le=1, description="share of harmful pairs among all dealt pairs")
    placement: Literal["spread", "concentrated"] = Field(
        description="harmful pairs evenly over all clients, or all of them on as few (malicious) clients as possible"
    )
    partition: Literal["iid", "dirichlet"] = Field(description="how benign pairs are dealt")
    dirichlet_alpha: float = Field(gt=0, description="small: each client sees few categories; large: nearly iid")
    samples_per_client: int = Field(ge=1)

    base_model: OptionalText = Field(description="a model folder or Hub name; the shipped miniature when not set")
    lora_rank: int = Field(ge=1)
    lora_alpha: int = Field(ge=1)
    lora_dropout: float = Field(ge=0, lt=1)
    learning_rate: float = Field(gt=0)
    local_epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    max_length: int = Field(ge=8, description="longest training example, in tokens; longer answers are cut")
    local_optimizer: Literal["adamw", "sgd"] = Field(description="the clients' optimiser; sgd is plain, for SCAFFOLD")

    strategy: StrategyName = Field(description="how updates are aggregated; docs/aggregation.md compares the values")
    client_rank: int = Field(ge=0, description="a silo's own, lower LoRA rank; 0 is lora-rank")
    residual_rank: int = Field(ge=0, description="fedex-lora, flora: how much of lora-rank holds what averaging misses")
    proximal_mu: float = Field(ge=0, description="fedprox: how strongly clients are held near what they were sent")
    server_learning_rate: float = Field(ge=0, description="the coordinator's own step; 0 is the strategy's default")
    server_momentum: float = Field(ge=0, lt=1, description="fedavgm: its momentum; fedadam, fedyogi: beta 1")
    server_beta2: float = Field(ge=0, lt=1, description="fedadam, fedyogi: beta 2")
    server_tau: float = Field(gt=0, description="fedadam, fedyogi, fedadagrad: added to the step's denominator")
    malicious_clients: int = Field(ge=0, description="robust rules: how many of a round's updates may be hostile")
    max_update_norm: float = Field(ge=0, description="an update that changed more (Euclidean norm) is refused; 0: none")

    curation_mode: Literal["drop", "replace", "revise"]
    min_filter_recall: float = Field(
        ge=0, le=1, description="curation refuses to start with a filter that its calibration shows to find less"
    )
    safety_url: OptionalText = Field(description="the safety service of the client's own silo")
    critique_url: OptionalText = Field(description="the critique service of the client's own silo")
    service_timeout_seconds: float = Field(gt=0)

    dp: Literal["off", "central", "local"] = Field(
        description="differential privacy for each client: noise on the mean, or on each update before it is sent"
    )
    dp_clipping_norm: float = Field(gt=0, description="a longer change (Euclidean norm) is shortened to this")
    dp_noise_multiplier: float = Field(gt=0, description="the noise's standard deviation, in clipping norms")
    dp_delta: float = Field(gt=0, lt=1, description="the delta at which epsilon is reported")
    dp_max_epsilon: float = Field(ge=0, description="nothing is released that would spend more; 0: no limit")
    secure_aggregation: bool = Field(description="always refused, with the reason: docs/adr/0010-privacy.md")

    screening: Literal["off", "report", "down-weight", "drop"] = Field(
        description="what to do with updates that would make the model less safe"
    )
    screening_prompts: int = Field(ge=1, description="red-team prompts that each client's adapter is tried with")
    screening_probe: OptionalPath = Field(description="a trained direction probe; the shipped one when not set")
    max_safety_drop: float = Field(
        gt=0, description="in nats per token: how much less likely an update may make refusals than compliances"
    )
    max_harm_cosine: float = Field(
        gt=0, le=1, description="how far an update may point in the direction of harmful training"
    )
    max_weight_ratio: float = Field(
        ge=1, description="where screening acts: a client's weight, at most so many times the median client's"
    )

    inference_url: OptionalText = Field(description="the coordinator's inference service")
    coordinator_critique_url: OptionalText = Field(description="the coordinator's critique service")
    red_team_data: OptionalPath = Field(description="JSONL of prompts that the aggregated model is tried with")
    replay_data: OptionalPath = Field(description="JSONL of benign pairs that are mixed into the alignment")
    cai_steps: int = Field(ge=1)
    cai_prompts: int = Field(ge=1, description="red-team prompts a round")
    cai_benign_prompts: int = Field(ge=0, description="benign prompts a round, drafted to count false alarms only")
    cai_answer_tokens: int = Field(ge=1)
    cai_batch_size: int = Field(ge=1)
    cai_learning_rate: float = Field(gt=0)
    cai_replay_share: float = Field(ge=0, lt=1, description="share of replay pairs in the alignment's data")

    @model_validator(mode="after")
    def _client_counts(self) -> Self:
        if not self.min_clients <= self.clients_per_round <= self.num_clients:
            raise ValueError(
                f"min-clients ({self.min_clients}) <= clients-per-round ({self.clients_per_round}) "
                f"<= num-clients ({self.num_clients}) must hold"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_data(self) -> Self:
        if self.silo_data or self.shard_data is not None:
            if self.benign_data or self.harmful_data:
                raise ValueError("silo-data and shard-data (own data) contradict benign-data and harmful-data (dealt)")
            shared = self.shard_data is not None and "{shard}" not in self.shard_data
            if shared and not self.silo_data and self.num_clients > 1:
                raise ValueError(
                    "shard-data needs {shard} in its path, so that each client has its own file (or silo-data=true)"
                )
        elif self.benign_data is None and self.harmful_share < 1:
            raise ValueError("set benign-data and harmful-data (dealt to the clients), shard-data, or silo-data=true")
        elif self.harmful_data is None and self.harmful_share > 0:
            raise ValueError(f"harmful-share={self.harmful_share} needs harmful-data")
        return self

    @model_validator(mode="after")
    def _arm_has_what_it_needs(self) -> Self:
        needs: dict[str, object] = {}
        if self.arm.filters:
            needs["safety-url"] = self.safety_url
            if self.curation_mode == "revise":
                needs["critique-url"] = self.critique_url
        if self.screening != "off":
            needs["red-team-data"] = self.red_team_data
        if self.arm.constitutional:
            needs["inference-url"] = self.inference_url
            needs["coordinator-critique-url"] = self.coordinator_critique_url
            needs["red-team-data"] = self.red_team_data
            if self.cai_replay_share > 0 or self.cai_benign_prompts > 0:
                needs["replay-data"] = self.replay_data
        missing = [key for key, value in needs.items() if value is None]
        if missing:
            mode = f" with curation-mode={self.curation_mode}" if self.arm.filters else ""
            screened = "" if self.screening == "off" else f" with screening={self.screening}"
            raise ValueError(f"arm={self.arm}{mode}{screened} needs {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _screening_sees_adapters(self) -> Self:
        if self.screening != "off" and self.strategy not in (*SEVERAL_RANKS, *ROBUST_NEEDS):
            raise ValueError(
                f"screening={self.screening} needs clients that send whole adapters; those of strategy={self.strategy} "
                "send something else"
            )
        return self

    @model_validator(mode="after")
    def _privacy_holds(self) -> Self:
        if self.dp == "off":
            if self.dp_max_epsilon:
                raise ValueError(f"dp-max-epsilon={self.dp_max_epsilon:g} needs dp=central or dp=local")
            return self
        chosen = f"dp={self.dp}"
        if self.strategy not in PRIVATE:
            raise ValueError(
                f"{chosen} with strategy={self.strategy}: clipping bounds what a client can change in a mean of "
                f"changes, and in nothing else; choose one of {', '.join(PRIVATE)} (best ffa-lora)"
            )
        if self.client_rank not in (0, self.lora_rank):
            raise ValueError(
                f"{chosen} needs one rank everywhere: a lower client-rank makes changes that are not bounded"
            )
        if self.screening in ("down-weight", "drop"):
            raise ValueError(
                f"{chosen} with screening={self.screening}: which updates count would depend on the data, and no noise "
                "covers that; choose one of the two (screening=report changes nothing)"
            )
        if self.dp == "central" and self.max_update_norm:
            raise ValueError(
                f"{chosen} clips long updates at dp-clipping-norm; max-update-norm would refuse them first"
            )
        if self.dp_delta * self.num_clients >= 1:
            raise ValueError(
                f"dp-delta={self.dp_delta} allows to publish a client's data outright: it has to be well below "
                f"1 / num-clients ({1 / self.num_clients:.4g})"
            )
        return self

    @model_validator(mode="after")
    def _no_secure_aggregation(self) -> Self:
        if not self.secure_aggregation:
            return self
        reads = {
            f"screening={self.screening}": self.screening != "off",
            f"strategy={self.strategy}": self.strategy in ROBUST_NEEDS,
            "dp=central": self.dp == "central",
            "max-update-norm": self.max_update_norm > 0,
        }
        if readers := [key for key, on in reads.items() if on]:
            raise ValueError(
                f"secure-aggregation hides each client's update from the coordinator, and {', '.join(readers)} "
                "read it there: they exclude each other"
            )
        raise ValueError(
            "secure-aggregation: Flower has SecAgg+ for its legacy apps only, and draws its masks from 32-bit seeds; "
            "dp=local hides an update in noise before it leaves its silo"
        )

    @model_validator(mode="after")
    def _ranks_fit_the_strategy(self) -> Self:
        if self.strategy in RESIDUAL and not 0 < self.residual_rank < self.lora_rank:
            raise ValueError(
                f"strategy={self.strategy} needs a residual-rank from 1 to lora-rank - 1 ({self.lora_rank - 1}): "
                "clients train the rest of lora-rank"
            )
        if self.residual_rank and self.strategy not in RESIDUAL:
            raise ValueError(f"residual-rank is for strategy={' and '.join(RESIDUAL)}; {self.strategy} has no residual")
        if self.client_rank > self.lora_rank:
            raise ValueError(f"client-rank={self.client_rank} is more than lora-rank={self.lora_rank}")
        if self.client_rank not in (0, self.lora_rank) and self.strategy not in SEVERAL_RANKS:
            raise ValueError(
                f"strategy={self.strategy} needs one rank everywhere; client-rank is for {', '.join(SEVERAL_RANKS)}"
            )
        return self

    @model_validator(mode="after")
    def _settings_are_the_strategys(self) -> Self:
        name = self.strategy
        if (name == "fedprox") != (self.proximal_mu > 0):
            raise ValueError(f"strategy={name} with proximal-mu={self.proximal_mu}: fedprox needs it, no other has it")
        if self.server_learning_rate and name not in SERVER_RATES:
            raise ValueError(f"strategy={name} has no server-learning-rate; {', '.join(SERVER_RATES)} have")
        if (name in ROBUST_NEEDS) != (self.malicious_clients > 0):
            raise ValueError(
                f"strategy={name} with malicious-clients={self.malicious_clients}: {', '.join(ROBUST_NEEDS)} need it, "
                "no other has it"
            )
        if name in ROBUST_NEEDS:
            factor, more = ROBUST_NEEDS[name]
            if self.min_clients < (needed := factor * self.malicious_clients + more):
                raise ValueError(
                    f"strategy={name} withstands malicious-clients={self.malicious_clients} only among {needed} or "
                    f"more updates; min-clients is {self.min_clients}"
                )
        return self

    @property
    def max_tokens_per_client(self) -> int:
        """No client can honestly train on more answer tokens in one pass; it bounds a client's weight."""
        if self.silo_data or self.shard_data is not None:
            return min(MAX_WEIGHT, MAX_OWN_PAIRS * self.max_length)
        hands = self.num_clients if self.partition == "dirichlet" else 1
        return min(MAX_WEIGHT, hands * self.samples_per_client * self.max_length)

    @property
    def server_rate(self) -> float:
        """The coordinator's learning rate, for strategies that have one."""
        return self.server_learning_rate or SERVER_RATES.get(self.strategy, 1.0)

    @property
    def own_rank(self) -> int:
        """The rank that is trained in this process."""
        return self.client_rank or self.lora_rank

    def identity(self) -> dict[str, Any]:
        """The settings that define what a round means, JSON-ready: the rest may change when a run is continued."""
        return self.model_dump(mode="json", by_alias=True, exclude=OPERATIONAL_FIELDS)


def parse_run_config(values: Mapping[str, RunValue], silo: Mapping[str, RunValue] | None = None) -> RunConfig:
    """Validate a run's configuration.

    Args:
        values: Flower's ``run_config``: every key, with its default or its override.
        silo: Flower's ``node_config`` of a client; its ``SILO_KEYS`` win over the coordinator's values. A silo with
            data of its own, and every silo of a run with ``silo-data``, takes none of the ``DATA_KEYS`` from the
            coordinator, which must not decide where a silo's raw data goes, not even when the silo forgot to.

    Raises:
        ConfigError: naming the key that is unknown, malformed, missing or in contradiction.
    """
    own = {key: value for key, value in (silo or {}).items() if key in SILO_KEYS}
    if silo is None and values.get("silo-data"):
        if values.get("shard-data"):
            raise ConfigError("silo-data=true: each silo names its own shard-data, the coordinator none")
    elif own.get("shard-data") or values.get("silo-data"):
        own = {**dict.fromkeys(DATA_KEYS, ""), **own}
    known = [name.replace("_", "-") for name in RunConfig.model_fields]
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ConfigError(f"unknown run-config key {key!r}{hint}", param=key)
    try:
        return RunConfig.model_validate({**values, **own})
    except ValidationError as error:
        problems = describe(error).replace("body: Value error, ", "")
        raise ConfigError(f"run-config: {problems}") from error


def default_run_config(pyproject: Path) -> dict[str, RunValue]:
    """The keys and defaults of ``[tool.flwr.app.config]``; raises ConfigError when there are none."""
    try:
        config: dict[str, RunValue] = tomllib.loads(pyproject.read_text("utf-8"))["tool"]["flwr"]["app"]["config"]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{pyproject}: no readable [tool.flwr.app.config] in it ({error})") from error
    return config
