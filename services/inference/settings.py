"""Settings of the inference service: flags and ``FEDWARD_INFERENCE_*`` variables."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from services.common.settings import Settings


class InferenceSettings(Settings):
    """How the service loads its model, batches requests and accepts adapters."""

    model_config = SettingsConfigDict(env_prefix="FEDWARD_INFERENCE_")

    port: int = Field(default=8103, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    model: str | None = Field(
        default=None, description="folder or Hub name of the base model; the shipped miniature by default"
    )
    model_id: str | None = Field(default=None, description="name the base model goes by; its folder's name by default")
    served_model_name: str = Field(default="fedward", description="name that answers with the active release")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: a GPU when there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: float32 on a CPU, the checkpoint's own on a GPU"
    )
    threads: int = Field(default=1, ge=1, description="CPU threads for one model step; more only on idle cores")
    max_batch: int = Field(default=64, ge=1, description="most answers written at the same time")
    max_waiting: int = Field(default=512, ge=0, description="most requests that wait; beyond it the answer is 429")
    max_answer_tokens: int = Field(
        default=256, ge=1, description="longest answer when a request names no limit (less where the context ends)"
    )
    adapters_dir: Path | None = Field(
        default=None, description="adapters are loaded only from below this folder; from anywhere when unset"
    )
    max_adapters: int = Field(default=16, ge=1, description="most adapters loaded at the same time")
    release: Path | None = Field(default=None, description="adapter folder to load and activate at start")
