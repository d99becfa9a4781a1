"""What can be released on a server, whichever it is; and the two that need little: this service and TGI."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import BaseModel

from services.common.http import ServiceClient
from services.contracts.adapters import ActivateRequest, AdapterInfo, CanaryRequest, LoadAdapterRequest, Release
from services.contracts.errors import RequestError

TIMEOUT_SECONDS = 300.0  # a server may read gigabytes for an adapter


class Adapter(NamedTuple):
    """The adapter that is meant. Without ``path`` the server has it already; without ``sha256`` any content will do."""

    name: str
    path: Path | None = None
    sha256: str | None = None


class ModelCard(BaseModel):
    """A name that a server answers under; ``root`` is where its weights come from, ``parent`` an adapter's base."""

    id: str
    owned_by: str = ""
    root: str | None = None
    parent: str | None = None
    sha256: str | None = None


class ModelCards(BaseModel):
    """Answer of ``GET /v1/models``."""

    data: list[ModelCard]


class _NoFields(BaseModel):
    """An empty body."""


class ReleaseServer(ABC):
    """A server that answers with adapters.

    Every method raises UpstreamError when the server is not there or does not do it, and RequestError when it cannot.
    """

    @abstractmethod
    def load(self, adapter: Adapter) -> None:
        """Let the adapter's name answer."""

    @abstractmethod
    def activate(self, adapter: Adapter) -> None:
        """Let the served name answer with the adapter, which is loaded first when its path is given."""

    @abstractmethod
    def start_canary(self, adapter: Adapter, percent: float) -> None:
        """Let the adapter answer a share of the requests for the served name."""

    @abstractmethod
    def roll_back(self) -> None:
        """End the canary; without one, let the served name answer with what it answered with before."""

    @abstractmethod
    def status(self) -> Release:
        """What the served name answers with."""

    @abstractmethod
    def close(self) -> None:
        """Close the kept connections."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FedwardServer(ReleaseServer):
    """This project's inference service."""

    def __init__(self, url: str) -> None:
        self._client = ServiceClient("inference", url, timeout_seconds=TIMEOUT_SECONDS)

    def load(self, adapter: Adapter) -> None:
        """Let the adapter's name answer; the service verifies it."""
        request = LoadAdapterRequest(lora_name=adapter.name, lora_path=str(adapter.path), sha256=adapter.sha256)
        self._client.post("/v1/load_lora_adapter", request, AdapterInfo)

    def activate(self, adapter: Adapter) -> None:
        """Let the served name answer with the adapter."""
        request = ActivateRequest(lora_name=adapter.name, sha256=self._loaded(adapter))
        self._client.post("/v1/release", request, Release)

    def start_canary(self, adapter: Adapter, percent: float) -> None:
        """Let the adapter answer a share of the requests for the served name."""
        request = CanaryRequest(lora_name=adapter.name, sha256=self._loaded(adapter), percent=percent)
        self._client.post("/v1/release/canary", request, Release)

    def _loaded(self, adapter: Adapter) -> str:
        """The hash to insist on: the caller's, or that of what is loaded under the name."""
        if adapter.path:
            self.load(adapter)
        card = self._client.get(f"/v1/models/{adapter.name}", ModelCard)
        return adapter.sha256 or card.sha256 or ""

    def roll_back(self) -> None:
        """End the canary, or go back to the release before."""
        self._client.post("/v1/release/rollback", _NoFields(), Release)

    def status(self) -> Release:
        """What the served name answers with."""
        return self._client.get("/v1/release", Release)

    def close(self) -> None:
        """Close the kept connection."""
        self._client.close()


class TgiInfo(BaseModel):
    """What is read of TGI's ``GET /info``."""

    model_id: str
    max_total_tokens: int


class TgiServer(ReleaseServer):
    """text-generation-inference: its launcher reads ``LORA_ADAPTERS`` once, so every change is a restart."""

    def __init__(self, url: str) -> None:
        self._client = ServiceClient("TGI", url, timeout_seconds=TIMEOUT_SECONDS)

    def load(self, adapter: Adapter) -> None:
        """Refused, with what is to be done instead."""
        raise self._restart(adapter)

    def activate(self, adapter: Adapter) -> None:
        """Refused, with what is to be done instead."""
        raise self._restart(adapter)

    def start_canary(self, adapter: Adapter, percent: float) -> None:
        """Refused, with what is to be done instead."""
        raise self._restart(adapter)

    def roll_back(self) -> None:
        """Refused, with what is to be done instead."""
        raise RequestError("TGI takes adapters only at start: restart it with the LORA_ADAPTERS that it had before")

    def status(self) -> Release:
        """The base model: which adapters TGI was started with, it does not tell."""
        return Release(served_model=self._client.get("/info", TgiInfo).model_id, adapter=None, sha256=None)

    def close(self) -> None:
        """Close the kept connection."""
        self._client.close()

    def _restart(self, adapter: Adapter) -> RequestError:
        value = f"{adapter.name}={adapter.path or '/path/of/the/adapter'}"
        return RequestError(
            f"TGI takes adapters only at start: restart it with LORA_ADAPTERS={value}, a few replicas first for a "
            f"canary; requests name the adapter by parameters.adapter_id={adapter.name}, or by model={adapter.name} "
            "in a chat"
        )
