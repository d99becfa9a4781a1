"""The calibration file: at which thresholds a model is run, and how well it does there on which data.

A classifier without one is a guess: the paper's guard found 0.5 % of the unsafe rows as released and 73.7 % after it
was fitted to the data (arXiv 2502.16691). ``python -m services.safety calibrate`` writes the file; the service loads
it, refuses one that belongs to another model, and reports it on ``GET /v1/model``.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from services.contracts.constitution import describe
from services.contracts.errors import ConfigError
from services.contracts.verdicts import Accuracy, CalibrationInfo

PointName = Literal["balanced", "strict"]
Share = Field(ge=0.0, le=1.0)


class OperatingPoint(BaseModel):
    """The thresholds of one way to run a model; a score that reaches one is over it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_threshold: float = Share
    response_threshold: float = Share
    refusal_threshold: float = Share
    categories: dict[str, float] = Field(default_factory=dict)


class Measured(BaseModel):
    """How well an operating point does on the labelled data; None where the data has no such items."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Accuracy | None = None
    response: Accuracy | None = None
    categories: dict[str, Accuracy] = Field(default_factory=dict)


class Ranking(BaseModel):
    """Figures without a threshold: area under the precision-recall curve, expected calibration error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auprc: float
    auprc_interval: tuple[float, float]
    ece: float


class Calibration(BaseModel):
    """The file's content. ``model_sha256`` ties it to one model; ``data_sha256`` says on what it was fitted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model_id: str
    model_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    data: str
    data_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int
    points: dict[PointName, OperatingPoint]
    measured: dict[PointName, Measured]
    prompt_ranking: Ranking | None = None
    response_ranking: Ranking | None = None

    @classmethod
    def unmeasured(cls, model_id: str, model_sha256: str, point: OperatingPoint) -> "Calibration":
        """One point under both names, of which nothing is known: where calibrating begins."""
        return cls(
            model_id=model_id,
            model_sha256=model_sha256,
            data="none",
            data_sha256="0" * 64,
            rows=0,
            points={"balanced": point, "strict": point},
            measured={"balanced": Measured(), "strict": Measured()},
        )

    def info(self, point: PointName) -> CalibrationInfo:
        """What ``GET /v1/model`` says of it."""
        measured = self.measured[point]
        return CalibrationInfo(
            data=self.data,
            data_sha256=self.data_sha256,
            rows=self.rows,
            prompt=measured.prompt,
            response=measured.response,
            categories=measured.categories,
        )


def read_calibration(path: Path, model_id: str, model_sha256: str) -> Calibration:
    """The calibration of a model.

    Raises:
        ConfigError: the file is missing, malformed, without one of the points, or of another model.
    """
    try:
        calibration = Calibration.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the calibration: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe(error)}") from error
    if missing := {"balanced", "strict"} - (set(calibration.points) & set(calibration.measured)):
        raise ConfigError(f"{path}: has no operating point {', '.join(sorted(missing))}; calibrate again")
    if calibration.model_sha256 != model_sha256:
        raise ConfigError(
            f"{path} is the calibration of {calibration.model_id} with sha256 {calibration.model_sha256}, but the "
            f"model is {model_id} with sha256 {model_sha256}; run `python -m services.safety calibrate` with it"
        )
    return calibration
