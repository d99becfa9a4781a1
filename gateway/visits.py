"""One request from its arrival to its record: who asks, what is in force for it, and what came of it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gateway.answers import Head
from gateway.audit_records import AuditRecord, DecisionEntry, RepairEntry
from gateway.auth import Identity
from gateway.policy import Action, Decision, Policy, milder
from gateway.policy_file import Route
from services.contracts.chat import Usage
from services.contracts.verdicts import Verdict


@dataclass
class Visit:
    """What is known of a request. The policy is that of its arrival, to the end.

    Args:
        request_id: as in the answer's ``x-request-id``.
        identity: who asks.
        route: which policy of the tenant applies.
        policy: what is in force.
        headers: of the answer, beside the protocol's own.
        model: what was asked for, where that is allowed.
        prompt: what the client asks, without the assistant's turns.
        held: how many characters of each choice wait for their verdict now.
        released: the texts that have left.
        tokens: what the request took, where the inference service says so.
        constitution_sha256: of the critique service, where it was asked.
    """

    request_id: str
    identity: Identity
    route: Route
    policy: Policy
    headers: dict[str, str] = field(default_factory=dict)
    model: str | None = None
    prompt: str = ""
    held: Mapping[int, int] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    tokens: int | None = None
    constitution_sha256: str | None = None
    _head: Head | None = None
    _decisions: list[DecisionEntry] = field(default_factory=list)
    _repairs: list[RepairEntry] = field(default_factory=list)
    _action: Action = Action.ALLOW
    _classifier: str | None = None
    _started: float = field(default_factory=time.perf_counter)

    @property
    def decisions(self) -> Sequence[DecisionEntry]:
        """What has been decided so far."""
        return self._decisions

    def note(self, decision: Decision, verdicts: Sequence[Verdict], characters: int, seconds: float) -> None:
        """Keep a decision with the verdicts that led to it.

        Args:
            decision: what was decided.
            verdicts: on the parts of the text.
            characters: how much text was checked.
            seconds: how long the check took.
        """
        would = decision.shadowed or decision.action
        entry = DecisionEntry.of(
            decision.direction.value,
            would.value,
            verdicts,
            shadow=decision.shadowed is not None,
            categories=decision.categories,
            characters=characters,
            check_ms=seconds * 1000,
        )
        self._decisions.append(entry)
        if verdicts:
            self._classifier = verdicts[0].model_id

    def note_repair(self, index: int, action: Action, outcome: str) -> None:
        """Keep what came of redacting or revising one choice."""
        self._repairs.append(RepairEntry(choice=index, action=action.value, outcome=outcome))

    def happened(self, action: Action) -> None:
        """Note what was done with the prompt, or with a part of the answer; the worst is what the client got."""
        if milder(self._action, action):
            self._action = action

    def answered(self, head: Head | None, usage: Usage | None) -> None:
        """Note who wrote the answer, and what it took."""
        self._head = head
        self.tokens = usage.total_tokens if usage else None

    def record(self, prompt_hmac: str, error: str | None) -> AuditRecord:
        """The record for the audit; ``error`` is the code of what ended the request early."""
        return AuditRecord(
            request_id=self.request_id,
            tenant=self.identity.tenant,
            key_name=self.identity.key_name,
            route=self.route.value,
            protocol="tgi" if self.route is Route.GENERATE else "openai",
            action="error" if error else self._action.value,
            decisions=tuple(self._decisions),
            repairs=tuple(self._repairs) or None,
            prompt_hmac=prompt_hmac if self.prompt else None,
            released_characters=sum(map(len, self.released)),
            model=(self._head and self._head.model) or self.model,
            adapter_sha256=self._head.system_fingerprint if self._head else None,
            constitution_sha256=self.constitution_sha256,
            policy_sha256=self.policy.sha256,
            classifier_id=self._classifier,
            latency_ms=round((time.perf_counter() - self._started) * 1000, 1),
            error=error,
        )
