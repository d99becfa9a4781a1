"""Releasing adapters from the command line, whichever server answers: ``python -m services.inference release``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from services.common.http import unavailable
from services.contracts.adapters import Release
from services.contracts.constitution import describe
from services.contracts.errors import ConfigError
from services.inference.release_server import (
    TIMEOUT_SECONDS,
    Adapter,
    FedwardServer,
    ModelCards,
    ReleaseServer,
    TgiInfo,
    TgiServer,
)
from services.inference.release_vllm import VllmServer

DESCRIPTION = """Load adapters and choose which one a server answers with.

examples:
  python -m services.inference release load     --name r3 --path runs/demo/release/r3
  python -m services.inference release canary   --name r3 --percent 5
  python -m services.inference release activate --name r3
  python -m services.inference release rollback
  python -m services.inference release status   --url http://vllm:8000

The server behind --url is recognised: this project's inference service, vLLM or TGI. activate and canary load the
adapter first when --path is given. rollback ends a canary, or goes back to the release before.
vLLM has no canary, and needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True. TGI takes adapters only at
start; the commands then say what to do.
"""
Shape = TypeVar("Shape", bound=BaseModel)
NEEDS: dict[str, tuple[str, ...]] = {
    "load": ("name", "path"),
    "activate": ("name",),
    "canary": ("name", "percent"),
    "rollback": (),
    "status": (),
}


def main(argv: Sequence[str]) -> int:
    """Do what ``argv`` asks, and print the release as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m services.inference release",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=NEEDS)
    parser.add_argument("--url", default="http://127.0.0.1:8103", help="the server (default: %(default)s)")
    parser.add_argument("--name", help="name of the adapter")
    parser.add_argument("--path", type=Path, help="its folder; the server has to see it under the same path")
    parser.add_argument("--sha256", help="hash of the adapter to insist on")
    parser.add_argument("--percent", type=float, help="share of the requests that the canary answers")
    parser.add_argument("--served", default="fedward", help="on vLLM, the name that clients ask for (%(default)s)")
    options = parser.parse_args(argv)
    missing = [f"--{name}" for name in NEEDS[options.action] if getattr(options, name) is None]
    if missing:
        parser.error(f"{options.action} needs {', '.join(missing)}")
    if options.percent is not None and not 0 < options.percent <= 100:
        raise ConfigError(f"--percent is {options.percent:g}; it has to be above 0 and at most 100", param="percent")
    with find_server(options.url, options.served) as server:
        try:
            _act(server, options)
        except ValidationError as error:
            raise ConfigError(describe(error)) from error
        print(server.status().model_dump_json(indent=2))
    return 0


def _act(server: ReleaseServer, options: argparse.Namespace) -> None:
    if options.action == "rollback":
        server.roll_back()
    elif options.action != "status":
        adapter = Adapter(options.name, options.path.resolve() if options.path else None, options.sha256)
        if options.action == "load":
            server.load(adapter)
        elif options.action == "activate":
            server.activate(adapter)
        else:
            server.start_canary(adapter, options.percent)


def find_server(url: str, served_name: str) -> ReleaseServer:
    """Recognise the server at ``url``.

    Raises:
        UpstreamUnavailable: nothing answers there.
        ConfigError: it is none of the three.
    """
    with httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS) as client:
        if _answer(client, "/v1/release", Release):
            return FedwardServer(url)
        models = _answer(client, "/v1/models", ModelCards)
        if models and any(card.owned_by == "vllm" for card in models.data):
            return VllmServer(url, served_name)
        if _answer(client, "/info", TgiInfo):
            return TgiServer(url)
    raise ConfigError(f"{url} is neither Fedward's inference service nor vLLM nor TGI", param="url")


def _answer(client: httpx.Client, path: str, shape: type[Shape]) -> Shape | None:
    try:
        response = client.get(path)
        return shape.model_validate_json(response.content) if response.is_success else None
    except httpx.RequestError as error:
        raise unavailable(str(client.base_url), error) from error
    except ValidationError:
        return None
