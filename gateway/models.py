"""What clients are told of the models: the inference service's numbers and hashes, under names of our own settings."""

from importlib.metadata import version
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ValidationError

from gateway.answers import hash_or_none
from gateway.policy import Policy
from gateway.protocols.parts import Count, UpstreamPart
from gateway.settings import GatewaySettings
from gateway.upstreams import INFERENCE, Upstreams
from services.contracts.chat import Json
from services.contracts.errors import UnknownModel, UpstreamUnavailable

OWNER = "fedward"
T = TypeVar("T", bound=UpstreamPart)
_Hash = Annotated[str | None, AfterValidator(hash_or_none)]


class _Card(UpstreamPart):
    id: str
    created: Count = 0
    max_model_len: Count | None = None
    sha256: _Hash = None

    def shown(self) -> Json:
        return {"object": "model", "owned_by": OWNER, **self.model_dump(exclude_none=True)}


class _Cards(UpstreamPart):
    data: list[_Card]


class _Info(UpstreamPart):
    """Of TGI's ``/info`` what is no text."""

    model_sha: _Hash = None
    max_concurrent_requests: Count | None = None
    max_best_of: Count | None = None
    max_stop_sequences: Count | None = None
    max_input_tokens: Count | None = None
    max_total_tokens: Count | None = None
    validation_workers: Count | None = None
    max_client_batch_size: Count | None = None


async def list_models(upstreams: Upstreams, settings: GatewaySettings, policy: Policy) -> Json:
    """The body of ``/v1/models`` under a policy; raises UpstreamUnavailable when the inference service gives none."""
    cards = await _read(_Cards, "/v1/models", upstreams)
    names = [name for name in settings.model_names if policy.allows_model(name)]
    return {"object": "list", "data": [card.shown() for card in cards.data if card.id in names]}


async def find_model(name: str, upstreams: Upstreams, settings: GatewaySettings, policy: Policy) -> Json:
    """The body of ``/v1/models/{name}``; raises UnknownModel when there is none, or not for clients."""
    for card in (await list_models(upstreams, settings, policy))["data"]:
        if card["id"] == name:
            return dict(card)
    raise UnknownModel("model: there is no model of this name; GET /v1/models lists them", param="model")


async def describe_service(upstreams: Upstreams, settings: GatewaySettings) -> Json:
    """The body of ``/info``; raises UpstreamUnavailable when the inference service gives none."""
    info = await _read(_Info, "/info", upstreams)
    own = {"model_id": settings.served_model_name, "router": "fedward-gateway", "version": version("fedward")}
    return own | info.model_dump(exclude_none=True)


async def _read(kind: type[T], path: str, upstreams: Upstreams) -> T:
    body = await upstreams.forward(INFERENCE, "GET", path)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise UpstreamUnavailable(INFERENCE, "answered something unreadable") from error
