"""Which weights answer under which name: the base, the loaded adapters, and the active release.

A name is looked up once, when a request arrives; the request keeps the variant it got. So loading, replacing,
activating, rolling back and starting a canary are each one assignment, and no answer mixes two variants.
"""

import random
import threading
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from services.common.logs import get_logger
from services.contracts.adapters import Canary, CanaryRequest, LoadAdapterRequest, Release, read_manifest
from services.contracts.errors import AdapterError, AdapterHashMismatch, RequestError, UnknownModel
from services.inference.generation import Variant
from services.inference.lora import merge_adapter


class _Candidate(NamedTuple):
    """A variant that answers a share of the requests for the served name, on trial."""

    variant: Variant
    percent: float

    def answers(self, key: str | None) -> bool:
        """Whether a request goes to the candidate; always the same for the same key.

        A request keeps its side when the share grows, and another candidate gets another choice of requests.
        """
        if key is None:
            return random.random() * 100 < self.percent
        place = sha256(f"{self.variant.sha256}:{key}".encode()).digest()
        return int.from_bytes(place[:8], "big") / 2**64 * 100 < self.percent


class _Served(NamedTuple):
    """What the served name answers with, and what it did before; replaced as one, so that no reader sees a mixture."""

    active: Variant
    previous: Variant | None = None
    candidate: _Candidate | None = None


class Adapters:
    """The loaded variants of one base model, and the release that the served name stands for.

    Args:
        base: the base model without an adapter.
        served_name: the name that answers with the active release, or with the base when there is none.
        directory: adapters are taken only from below this folder; from anywhere when None.
        limit: most adapters loaded at the same time.
    """

    def __init__(self, base: Variant, *, served_name: str, directory: Path | None, limit: int) -> None:
        self._base = base
        self._served_name = served_name
        self._directory = directory.resolve() if directory else None
        self._limit = limit
        self._loaded: dict[str, Variant] = {}
        self._served = _Served(base)
        self._changing = threading.Lock()

    def find(self, name: str, key: str | None = None) -> Variant:
        """The variant that answers a request for ``name`` now.

        Args:
            name: the served name, the base's, or a loaded adapter's.
            key: what decides whether a canary answers for the served name; None leaves it to chance.

        Raises:
            UnknownModel: there is none of that name; the message lists the known ones.
        """
        if name == self._served_name:
            served = self._served
            candidate = served.candidate
            return candidate.variant if candidate and candidate.answers(key) else served.active
        if name == self._base.name:
            return self._base
        variant = self._loaded.get(name)
        if variant is None:
            known = ", ".join(self.variants())
            raise UnknownModel(f"model {name!r} is not loaded; known: {known}", param="model")
        return variant

    def variants(self) -> dict[str, Variant]:
        """Every name that can be asked for, the served one first, with what answers."""
        return {self._served_name: self._served.active, self._base.name: self._base, **self._loaded}

    def load(self, request: LoadAdapterRequest) -> Variant:
        """Read, check and merge an adapter, then let its name answer; a loaded one of that name is replaced.

        The release stays what it was: replacing a name does not change what the served name answers with.

        Raises:
            AdapterError, AdapterHashMismatch: the adapter is not fit to be served; nothing has changed.
        """
        with self._changing:
            name = request.lora_name
            if name in (self._served_name, self._base.name):
                raise AdapterError(
                    f"{name} is the name of the base or of the release; choose another", param="lora_name"
                )
            if name not in self._loaded and len(self._loaded) >= self._limit:
                raise AdapterError(f"{self._limit} adapters are loaded, which is the limit; unload one first")
            variant = self._read(name, self._inside(request.lora_path), request.sha256)
            self._loaded = {**self._loaded, name: variant}
            get_logger().info("adapter loaded", adapter=name, sha256=variant.sha256)
            return variant

    def _read(self, name: str, path: Path, expected_sha256: str | None) -> Variant:
        try:
            manifest = read_manifest(path, expected_sha256)
            if manifest.base_model_sha256 != self._base.sha256:
                raise AdapterError(
                    f"adapter {path} was trained on a base model with sha256 {manifest.base_model_sha256}; "
                    f"this service runs {self._base.name} with {self._base.sha256}"
                )
            return Variant(name, manifest.sha256, merge_adapter(self._base.network, path, manifest.sha256))
        except OSError as error:  # no permission, or the folder is replaced while it is read
            raise AdapterError(f"adapter {path} cannot be read: {error.strerror}") from error

    def _inside(self, lora_path: str) -> Path:
        if not lora_path.isprintable():
            raise AdapterError("lora_path holds characters that are not printable", param="lora_path")
        if self._directory is None:
            return Path(lora_path)
        path = (self._directory / lora_path).resolve()
        if not path.is_relative_to(self._directory):
            raise AdapterError(f"{lora_path} lies outside the folder that adapters are loaded from", param="lora_path")
        return path

    def unload(self, name: str) -> Variant:
        """Forget an adapter; answers in work are finished with it.

        Raises:
            UnknownModel: no adapter of that name is loaded.
            RequestError: it is the active release, or the canary.
        """
        with self._changing:
            variant = self._loaded_adapter(name)
            served = self._served
            if variant.sha256 == served.active.sha256:
                raise RequestError(f"{name} is the active release; activate another one first", param="lora_name")
            if served.candidate and variant.sha256 == served.candidate.variant.sha256:
                raise RequestError(f"{name} is the canary; activate it or roll back first", param="lora_name")
            self._loaded = {other: v for other, v in self._loaded.items() if other != name}
            get_logger().info("adapter unloaded", adapter=name, sha256=variant.sha256)
            return variant

    def activate(self, name: str, expected_sha256: str) -> Release:
        """Let the served name answer with a loaded adapter; this ends a canary, and promotes it when it is this one.

        Raises:
            UnknownModel: it is not loaded.
            AdapterHashMismatch: what is loaded under that name has another hash.
        """
        with self._changing:
            variant = self._loaded_adapter(name, expected_sha256)
            active, previous, _ = self._served
            self._served = _Served(variant, previous if variant.sha256 == active.sha256 else active)
            get_logger().info("release activated", adapter=name, sha256=variant.sha256)
            return self.release()

    def start_canary(self, request: CanaryRequest) -> Release:
        """Let a loaded adapter answer a share of the requests for the served name; asked again, it changes the share.

        Raises:
            UnknownModel: it is not loaded.
            AdapterHashMismatch: what is loaded under that name has another hash.
            RequestError: it is the active release already.
        """
        with self._changing:
            variant = self._loaded_adapter(request.lora_name, request.sha256)
            active, previous, _ = self._served
            if variant.sha256 == active.sha256:
                raise RequestError(f"{variant.name} is the active release; it answers every request", param="lora_name")
            self._served = _Served(active, previous, _Candidate(variant, request.percent))
            get_logger().info("canary set", adapter=variant.name, sha256=variant.sha256, percent=request.percent)
            return self.release()

    def roll_back(self) -> Release:
        """End the canary; without one, let the served name answer with what it answered with before.

        Raises:
            RequestError: there is neither.
        """
        with self._changing:
            active, previous, candidate = self._served
            if candidate is not None:
                self._served = _Served(active, previous)
                get_logger().info("canary ended", adapter=candidate.variant.name, sha256=candidate.variant.sha256)
                return self.release()
            if previous is None:
                raise RequestError("there is no earlier release to roll back to")
            if previous is not self._base:
                self._loaded = {previous.name: previous} | self._loaded
            self._served = _Served(previous)
            get_logger().info("release rolled back", adapter=previous.name, sha256=previous.sha256)
            return self.release()

    def release(self) -> Release:
        """What the served name answers with; ``previous`` is what a rollback without a canary would bring back."""
        active, previous, candidate = self._served
        adapter = None if active is self._base else active
        canary = None
        if candidate:
            variant = candidate.variant
            canary = Canary(adapter=variant.name, sha256=variant.sha256, percent=candidate.percent)
        return Release(
            served_model=self._served_name,
            adapter=adapter.name if adapter else None,
            sha256=adapter.sha256 if adapter else None,
            previous=previous.name if previous else None,
            canary=canary,
        )

    def _loaded_adapter(self, name: str, expected_sha256: str | None = None) -> Variant:
        variant = self._loaded.get(name)
        if variant is None:
            known = ", ".join(self._loaded) or "none"
            raise UnknownModel(f"adapter {name!r} is not loaded; loaded: {known}", param="lora_name")
        if expected_sha256 not in (None, variant.sha256):
            raise AdapterHashMismatch(f"adapter {name} is loaded with sha256 {variant.sha256}, not {expected_sha256}")
        return variant
