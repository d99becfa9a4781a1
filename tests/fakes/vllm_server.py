"""vLLM's routes for adapters, as its versions behave: a name that is taken is refused, or replaced in place."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

BASE = "org/base"


class FakeVllm:
    """A server with ``app`` to serve; ``loaded`` are the adapters by name, with the folder that each came from.

    Args:
        inplace: a newer version, which knows ``load_inplace``.
        updating: started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True.
    """

    def __init__(self, *, inplace: bool = True, updating: bool = True) -> None:
        self.inplace = inplace
        self.loaded: dict[str, str] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.app = FastAPI()
        self.app.get("/health")(self.health)
        self.app.get("/v1/models")(self.models)
        if updating:
            self.app.post("/v1/load_lora_adapter")(self.load)
            self.app.post("/v1/unload_lora_adapter")(self.unload)

    def health(self) -> Response:
        return Response()

    def models(self) -> dict[str, Any]:
        card = {"object": "model", "created": 0, "owned_by": "vllm"}
        adapters = [card | {"id": name, "root": root, "parent": BASE} for name, root in self.loaded.items()]
        return {"object": "list", "data": [card | {"id": BASE, "root": BASE, "parent": None}, *adapters]}

    def load(self, body: dict[str, Any]) -> Response:
        self.calls.append(("load", body))
        name, path = body["lora_name"], body["lora_path"]
        if name in self.loaded and not (self.inplace and body.get("load_inplace")):
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").is_file() or (Path(path) / "unreadable").exists():
            return _error(404, f"No adapter found for '{name}'")
        self.loaded[name] = path
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def unload(self, body: dict[str, Any]) -> Response:
        self.calls.append(("unload", body))
        if self.loaded.pop(body["lora_name"], None) is None:
            return _error(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
        return PlainTextResponse(f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")


def _error(status: int, message: str) -> Response:
    kind = "NotFoundError" if status == 404 else "InvalidUserInput"
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)
