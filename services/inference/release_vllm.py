"""Releases on vLLM, which has names for adapters but no release: the served name is itself an adapter that is replaced.

What answered before is kept loaded under ``<served name>-previous``, so that a rollback needs no state of ours: vLLM
lists every adapter with the folder that it came from. vLLM checks no hash; the folder is verified here, before vLLM is
told to read it. Source: vLLM's documentation of LoRA adapters, dynamic serving.
"""

from collections.abc import Mapping
from pathlib import Path

import httpx

from services.common.http import read_answer, unavailable
from services.contracts.adapters import Release, read_manifest
from services.contracts.errors import AdapterError, RequestError, UpstreamRejected, UpstreamUnavailable
from services.inference.release_server import TIMEOUT_SECONDS, Adapter, ModelCard, ModelCards, ReleaseServer

Fields = Mapping[str, str | bool | None]


class VllmServer(ReleaseServer):
    """vLLM's OpenAI server, started with ``--enable-lora`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True``."""

    def __init__(self, url: str, served_name: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS)
        self._served = served_name
        self._previous = f"{served_name}-previous"

    def load(self, adapter: Adapter) -> None:
        """Let the adapter's name answer."""
        self._replace(adapter.name, str(self._verified(adapter)))

    def activate(self, adapter: Adapter) -> None:
        """Let the served name answer with the adapter, and keep what answered before."""
        if adapter.path:
            self.load(adapter)  # a trial under its own name: what vLLM cannot read must not cost the kept release
        root = str(self._verified(adapter))
        before = self._adapters().get(self._served)
        if before and before.root and before.root != root:
            self._replace(self._previous, before.root)
        self._replace(self._served, root)

    def start_canary(self, adapter: Adapter, percent: float) -> None:
        """Refused, with what is to be done instead."""
        raise RequestError(
            f"vLLM cannot divide the requests for one name: load {adapter.name}, and have the router in front send "
            f"{percent:g} % of the requests to that name"
        )

    def roll_back(self) -> None:
        """Let the served name answer with what is kept from before."""
        kept = self._adapters().get(self._previous)
        if kept is None or not kept.root:
            raise RequestError(f"there is no earlier release to roll back to: vLLM has no adapter {self._previous}")
        self._replace(self._served, kept.root)
        self._unload(self._previous)

    def status(self) -> Release:
        """What the served name answers with; the hash is read from its folder, when that can be seen from here."""
        adapters = self._adapters()
        served, previous = adapters.get(self._served), adapters.get(self._previous)
        if served is None or not served.root:
            return Release(served_model=self._served, adapter=None, sha256=None)
        try:
            sha256 = read_manifest(Path(served.root)).sha256
        except (AdapterError, OSError):
            sha256 = None
        before = Path(previous.root).name if previous and previous.root else None
        return Release(served_model=self._served, adapter=Path(served.root).name, sha256=sha256, previous=before)

    def close(self) -> None:
        """Close the kept connection."""
        self._client.close()

    def _verified(self, adapter: Adapter) -> Path:
        """The adapter's folder, whose files fit its manifest and the hash that the caller insists on."""
        path = adapter.path
        if path is None:
            card = self._adapters().get(adapter.name)
            if card is None or not card.root:
                raise RequestError(f"vLLM has not loaded {adapter.name}; give --path")
            path = Path(card.root)
        read_manifest(path, adapter.sha256)
        return path

    def _adapters(self) -> dict[str, ModelCard]:
        """The loaded adapters by name; the base model, which has no parent, is not among them."""
        cards = read_answer("vLLM", self._call("GET", "/v1/models"), ModelCards).data
        return {card.id: card for card in cards if card.parent}

    def _replace(self, name: str, root: str) -> None:
        """Load a folder under a name; what had the name is replaced in one step where vLLM can do that.

        Older versions refuse a name that is taken. There it is unloaded first: for a moment, nothing has the name. When
        the new folder then cannot be loaded, the old one is put back.
        """
        held = self._adapters().get(name)
        fields = {"lora_name": name, "lora_path": root}
        if held is None:
            self._post("load_lora_adapter", fields)
            return
        try:
            self._post("load_lora_adapter", {**fields, "load_inplace": True})
        except UpstreamRejected:
            self._unload(name)
            try:
                self._post("load_lora_adapter", fields)
            except (UpstreamRejected, UpstreamUnavailable):
                self._post("load_lora_adapter", {"lora_name": name, "lora_path": held.root})
                raise

    def _unload(self, name: str) -> None:
        self._post("unload_lora_adapter", {"lora_name": name})

    def _post(self, route: str, fields: Fields) -> None:
        """Call an adapter route; its answer is a sentence, and its errors are vLLM's own."""
        response = self._call("POST", f"/v1/{route}", fields)
        if response.is_success:
            return
        if response.status_code in (404, 405) and not response.content.count(b'"message"'):
            raise UpstreamRejected(
                "vLLM", f"it has no /v1/{route}: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            )
        kind = UpstreamUnavailable if response.status_code >= 500 else UpstreamRejected
        raise kind(
            "vLLM", f"HTTP {response.status_code} from /v1/{route} for {fields['lora_name']}: {_reason(response)}"
        )

    def _call(self, method: str, path: str, fields: Fields | None = None) -> httpx.Response:
        try:
            return self._client.request(method, path, json=fields)
        except httpx.RequestError as error:
            raise unavailable("vLLM", error) from error


def _reason(response: httpx.Response) -> str:
    """The message of vLLM's error body, in its newer or its older form; no prompt is part of these calls."""
    try:
        body = response.json()
        return str(body.get("error", body)["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return response.reason_phrase
