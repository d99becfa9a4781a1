"""What the console shows, as JSON: recent decisions, the policy in force, the gateway's health.

A caller sees what belongs to its own tenant. What concerns all tenants alike (readiness, counters, the release) is
shown to every caller, as ``/health/ready``, ``/metrics`` and ``/info`` show it anyway.
"""

import asyncio
import json
from collections.abc import Iterator

from prometheus_client import Counter
from pydantic import BaseModel, ValidationError
from sqlalchemy.exc import SQLAlchemyError

from gateway.admission import Admission
from gateway.audit import RECORDS, SERVICE
from gateway.audit_records import AuditRow, Place
from gateway.auth import Identity
from gateway.metrics import DECISIONS, RELEASED_BEFORE_VERDICT, UPSTREAM_CANCELLATIONS
from gateway.policy import Policy
from gateway.policy_file import Route
from gateway.readiness import PROBE_SECONDS, Readiness
from gateway.settings import GatewaySettings
from gateway.upstreams import INFERENCE, SAFETY, PassedOn, Upstreams
from services.contracts.adapters import Release
from services.contracts.chat import Json
from services.contracts.errors import FedwardError, UpstreamUnavailable
from services.contracts.hazards import HazardCategory
from services.contracts.verdicts import ClassifierInfo

RECORD_ID = r"^[0-9TZ:.-]{24}_\d{1,18}_[0-9a-f]{1,32}$"
NOT_SHOWN = ("prompt_hmac", "text_sha256")  # of a record: they are for searching the audit with its key
COUNTERS = {
    "released_before_verdict": RELEASED_BEFORE_VERDICT,
    "checks": DECISIONS,
    "generations_stopped": UPSTREAM_CANCELLATIONS,
    "audit_records": RECORDS,
}


class Views:
    """The console's pages of one gateway."""

    def __init__(self, admission: Admission, upstreams: Upstreams, ready: Readiness, settings: GatewaySettings) -> None:
        self._admission = admission
        self._upstreams = upstreams
        self._ready = ready
        self._settings = settings

    def session(self, identity: Identity) -> Json:
        """Who the caller is, what it may ask for, on which routes nothing is enforced, and the categories' names."""
        policies = self._admission.policies_of(identity.tenant)
        return {
            "tenant": identity.tenant,
            "key_name": identity.key_name,
            "auth": self._settings.auth,
            "models": [name for name in self._settings.model_names if policies[Route.CHAT].allows_model(name)],
            "shadow": [
                route.value for route, policy in policies.items() if policy.shadow and route is not Route.MODERATIONS
            ],
            "categories": {category.value: category.readable for category in HazardCategory},
        }

    async def decisions(self, tenant: str, limit: int, before: str | None) -> Json:
        """A page of the tenant's audit records, the latest first, without anything of their texts.

        ``next`` is what the page after it comes ``before``; None where there is none.

        Raises:
            UpstreamUnavailable: the audit cannot be read.
        """
        try:
            rows = await self._admission.recent(tenant, limit + 1, _place(before) if before else None)
        except SQLAlchemyError as error:
            raise UpstreamUnavailable(SERVICE, "its records cannot be read") from error
        page = [_shown(row) for row in rows[:limit]]
        return {"records": page, "next": page[-1]["id"] if len(rows) > limit else None}

    def policies(self, tenant: str) -> Json:
        """What is in force for the tenant on each route; of a system prompt, which is the operator's, the length."""
        policies = self._admission.policies_of(tenant)
        return {
            "tenant": tenant,
            "from_file": self._settings.policy_file is not None,
            "amiss": self._amiss().get("policy"),
            "routes": {route.value: _described(policy) for route, policy in policies.items()},
        }

    async def health(self) -> Json:
        """Whether the gateway can serve, what its services say of themselves, what is amiss, and the counters."""
        reason, classifier, release = await asyncio.gather(
            self._ready(),
            self._about(SAFETY, "/v1/model", ClassifierInfo),
            self._about(INFERENCE, "/v1/release", Release),
        )
        return {
            "not_ready": reason,
            "services": {SAFETY: classifier, INFERENCE: release},
            "served_model": self._settings.served_model_name,
            "amiss": self._amiss(),
            "counters": {name: list(_samples(counter)) for name, counter in COUNTERS.items()},
        }

    def _amiss(self) -> dict[str, str]:
        """What is not as the operator wants it.

        The reason may name other tenants. So it is told only where everybody is the operator: without identification.
        """
        if self._settings.auth == "none":
            return self._admission.amiss
        return dict.fromkeys(self._admission.amiss, "not as it should be; the gateway's log says why")

    async def _about(self, name: str, path: str, model: type[BaseModel]) -> Json:
        """What a service says of itself; ``about`` is None for another server than ours, which does not say it."""
        try:
            body = await self._upstreams.about(name, path, PROBE_SECONDS)
            about = model.model_validate_json(body).model_dump(mode="json", exclude={"previous"})
        except (PassedOn, ValidationError):
            return {"error": None, "about": None}
        except FedwardError as error:
            return {"error": error.message, "about": None}
        return {"error": None, "about": about}


def _described(policy: Policy) -> Json:
    described = policy.model_dump(mode="json", exclude={"system_prompt"})
    return described | {"sha256": policy.sha256, "system_prompt_characters": len(policy.system_prompt or "")}


def _shown(row: AuditRow) -> Json:
    """A record as the console gets it; its id is also the cursor of the records before it."""
    shown = {name: value for name, value in json.loads(row.body).items() if name not in NOT_SHOWN}
    return {"id": f"{row.at}_{row.seq}_{row.chain}"} | shown


def _place(record_id: str) -> Place:
    at, seq, chain = record_id.split("_")
    return Place(at, int(seq), chain)


def _samples(counter: Counter) -> Iterator[Json]:
    """The labels of every series of a counter with its count."""
    for metric in counter.collect():
        for sample in metric.samples:
            if sample.name.endswith("_total"):
                yield {**sample.labels, "count": int(sample.value)}
