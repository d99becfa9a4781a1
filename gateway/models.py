"""The models that clients may see: of all that the inference service has, the served one and those that are allowed."""

from pydantic import BaseModel, ConfigDict, ValidationError

from gateway.policy import Policy
from gateway.settings import GatewaySettings
from gateway.upstreams import INFERENCE, Upstreams
from services.contracts.chat import Json
from services.contracts.errors import UnknownModel, UpstreamUnavailable


class _Card(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: str


class _Cards(BaseModel):
    data: list[_Card]


async def list_models(upstreams: Upstreams, settings: GatewaySettings, policy: Policy) -> Json:
    """The body of ``/v1/models`` under a policy; raises UpstreamUnavailable when the inference service gives none."""
    body = await upstreams.forward(INFERENCE, "GET", "/v1/models")
    try:
        cards = _Cards.model_validate_json(body).data
    except ValidationError as error:
        raise UpstreamUnavailable(INFERENCE, "answered something unreadable") from error
    names = [name for name in settings.model_names if policy.allows_model(name)]
    return {"object": "list", "data": [card.model_dump() for card in cards if card.id in names]}


async def find_model(name: str, upstreams: Upstreams, settings: GatewaySettings, policy: Policy) -> Json:
    """The body of ``/v1/models/{name}``; raises UnknownModel when there is none, or not for clients."""
    for card in (await list_models(upstreams, settings, policy))["data"]:
        if card["id"] == name:
            return dict(card)
    raise UnknownModel("model: there is no model of this name; GET /v1/models lists them", param="model")
