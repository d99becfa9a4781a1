"""A gateway with API keys and a policy file between two fake services, for the tests of its console."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from gateway.api_keys import add_key, new_key
from gateway.app import build_app
from gateway.settings import GatewaySettings
from tests.fakes.gateway_inference import FakeInference
from tests.fakes.gateway_stack import PATIENT, chat_body
from tests.fakes.gateway_upstreams import FakeSafety, serving

SYSTEM_PROMPT = "Mention no competitor."
POLICY = f"""\
schema_version: 1
default:
  system_prompt: {SYSTEM_PROMPT}
tenants:
  trial:
    shadow: true
  mild:
    response: {{action: redact}}
  strict:
    models: [other]
    response:
      threshold: 0.25
      categories:
        S4: {{threshold: 0.1}}
"""


class Guarded(NamedTuple):
    """The gateway, a client of it, its fakes, a key of each tenant, and its policy file."""

    url: str
    client: httpx.Client
    inference: FakeInference
    safety: FakeSafety
    keys: dict[str, str]
    policy: Path

    def get(self, path: str, tenant: str) -> Any:
        """The body of one of the console's answers."""
        answer = self.client.get(f"/console/api/{path}", headers=self.header(tenant))
        assert answer.status_code == 200, answer.text
        return answer.json()

    def chat(self, tenant: str, prompt: str = "Hello", **headers: str) -> httpx.Response:
        """Ask for a streamed answer."""
        body = chat_body(stream=True) | {"messages": [{"role": "user", "content": prompt}]}
        return self.client.post("/v1/chat/completions", json=body, headers=self.header(tenant) | headers)

    def header(self, tenant: str) -> dict[str, str]:
        """Who asks."""
        return {"authorization": f"Bearer {self.keys[tenant]}"}


@contextmanager
def guarded_gateway(folder: Path, **more: Any) -> Iterator[Guarded]:
    """Serve it from a thread; ``more`` settings win."""
    keys = {}
    for tenant in ("plain", "trial", "strict", "mild"):
        key = new_key(tenant, "test")
        add_key(folder / "keys.json", key)
        keys[tenant] = key.secret
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    inference, safety = FakeInference(), FakeSafety()
    with ExitStack() as exits:
        urls = [exits.enter_context(serving(service)) for service in (inference, safety)]
        values = {name: value for name, value in PATIENT.items() if name.endswith("seconds")}
        values |= {"inference_url": urls[0], "safety_url": urls[1], "audit_url": f"sqlite:///{folder}/audit.db"}
        values |= {"served_model_name": "fake", "allowed_models": ("other",), "policy_file": policy}
        values |= {"auth": "keys", "keys_file": folder / "keys.json"}
        url = exits.enter_context(serving(build_app(GatewaySettings.model_validate(values | more))))
        client = exits.enter_context(httpx.Client(base_url=url, timeout=20))
        yield Guarded(url, client, inference, safety, keys, policy)
