"""How each peer is started in front of the mock services, with a check before and after the model."""

import json
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.bench.install import ROOT, litellm, node, own_python, portkey
from gateway.bench.script import MODEL
from gateway.bench.services import MockServices
from services.common.ports import free_port

CHECK_MS = 3000  # Portkey's default for a webhook


@dataclass(frozen=True)
class Launch:
    """What it takes to start a peer and to ask it.

    ``headers`` and ``fields`` are added to every request; ``variants`` are further fields that switch to another
    setting of its stream checks.
    """

    command: Sequence[str]
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def launch_fedward(
    services: MockServices, cache: Path, folder: Path, python: Path | None = None, flags: Sequence[str] = ()
) -> Launch:
    """This project's gateway with its default settings."""
    port = free_port()
    command = [str(python or own_python(cache)), "-m", "gateway", "--port", str(port), "--log-level", "warning"]
    command += ["--inference-url", services.upstream_url, "--safety-url", services.classifier_url]
    command += ["--served-model-name", MODEL, "--audit-url", f"sqlite:///{folder / 'audit.db'}", *flags]
    return Launch(command, port, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def launch_fastapi_httpx(services: MockServices, cache: Path, folder: Path, python: Path | None = None) -> Launch:
    """What people write themselves, on the same server and in the same environment as ours."""
    port = free_port()
    command = shlex.join([str(python or own_python(cache)), "-m", "uvicorn", "gateway.bench.fastapi_httpx.app:app"])
    command += f" --host 127.0.0.1 --port {port} --no-access-log --log-level warning"
    urls = {"UPSTREAM_URL": services.upstream_url, "CLASSIFIER_URL": services.classifier_url}
    return Launch(shlex.split(command), port, urls | {"PYTHONPATH": str(ROOT)})


def launch_litellm(services: MockServices, cache: Path, folder: Path) -> Launch:
    """LiteLLM's proxy with its generic guardrail before and after the model: one worker, no database."""
    program = litellm(cache)
    port, key, settings = free_port(), f"sk-{secrets.token_urlsafe(24)}", folder / "litellm.yaml"
    settings.write_text(json.dumps(_litellm_settings(services, key)))  # JSON is YAML too
    command = [str(program), "--config", str(settings), "--host", "127.0.0.1", "--port", str(port)]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return Launch(
        [*command, "--num_workers", "1"],
        port,
        environment,
        headers={"authorization": f"Bearer {key}"},
        fields={"guardrails": ["prompt", "answer"]},
        variants={name: {"guardrails": ["prompt", name]} for name in _LITELLM_STREAMS if name != "answer"},
    )


_LITELLM_STREAMS: dict[str, dict[str, Any]] = {
    "answer": {},
    "end_of_stream_only": {"streaming_end_of_stream_only": True},
    "every_chunk": {"streaming_sampling_rate": 1},
}


def _litellm_settings(services: MockServices, key: str) -> dict[str, Any]:
    def guardrail(name: str, mode: str, options: dict[str, Any]) -> dict[str, Any]:
        where = {"guardrail": "generic_guardrail_api", "mode": mode, "api_base": services.classifier_url}
        return {"guardrail_name": name, "litellm_params": where | options}

    model = {"model": "openai/bench", "api_base": f"{services.upstream_url}/v1", "api_key": "none"}
    answers = [guardrail(name, "post_call", options) for name, options in _LITELLM_STREAMS.items()]
    return {
        "model_list": [{"model_name": "bench", "litellm_params": model}],
        "guardrails": [guardrail("prompt", "pre_call", {}), *answers],
        "general_settings": {"master_key": key},
    }


def launch_portkey(services: MockServices, cache: Path, folder: Path) -> Launch:
    """Portkey's gateway with its webhook guardrail, which denies, before and after the model."""
    script, port = portkey(cache), free_port()
    webhook = {"webhookURL": f"{services.classifier_url}/webhook", "timeout": CHECK_MS}
    hook = {"type": "guardrail", "deny": True, "checks": [{"id": "default.webhook", "parameters": webhook}]}
    settings = {
        "provider": "openai",
        "api_key": "none",
        "custom_host": f"{services.upstream_url}/v1",
        "before_request_hooks": [hook | {"id": "prompt"}],
        "after_request_hooks": [hook | {"id": "answer"}],
    }
    command = [node(), str(script), f"--port={port}", "--headless"]
    return Launch(command, port, {"NODE_ENV": "production"}, headers={"x-portkey-config": json.dumps(settings)})


LAUNCHES: dict[str, Callable[..., Launch]] = {
    "fedward": launch_fedward,
    "fastapi_httpx": launch_fastapi_httpx,
    "litellm": launch_litellm,
    "portkey": launch_portkey,
}
