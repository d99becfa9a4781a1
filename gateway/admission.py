"""What surrounds every request: who asks, what policy and quotas allow them, and the record of what came of it.

::

    visit      the credential becomes a tenant, the tenant and the route a policy    401, 503
    recorded   around all the rest: nothing is answered without a durable record      503
    admitted   the model is allowed, a request is counted, its tokens are reserved    404, 429
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial

from gateway.asked import Asked, Kind
from gateway.audit import AuditLog
from gateway.audit_records import AuditRow, Place
from gateway.auth import Authenticator
from gateway.exposure import require_safe_start
from gateway.limits import Limiter
from gateway.live import LiveVisits
from gateway.policy import DirectionPolicy, Policy, PromptPolicy, StreamPolicy
from gateway.policy_file import PolicySet, Route, read_policies
from gateway.quotas import estimate_tokens
from gateway.settings import GatewaySettings
from gateway.visits import Visit
from gateway.watched_file import WatchedFile, watching
from services.common.connections import ClientLeft
from services.contracts.errors import FedwardError, UnknownModel

LIKELY_ANSWER = 256  # tokens to reserve for an answer of which the client does not say how long it may be


class Admission:
    """Identity, policies, quotas and audit of one gateway.

    Raises:
        ConfigError: a file cannot be used, the audit cannot be opened, or it is not safe to listen on this address.
    """

    def __init__(self, settings: GatewaySettings) -> None:
        require_safe_start(
            settings.host,
            auth=settings.auth,
            insecure_no_auth=settings.insecure_no_auth,
            audit_key_file=settings.audit_key_file,
        )
        self._auth = Authenticator(settings)
        self._limiter = Limiter(settings)
        read = partial(read_policies, can_revise=settings.critique_url is not None)
        self._in_force = WatchedFile(settings.policy_file, read) if settings.policy_file else None
        self._uniform = PolicySet.uniform(policy_of_settings(settings))
        self._audit = AuditLog(settings)
        self.live = LiveVisits()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look after the files inside the block; at its end write what the audit still has to write."""
        async with AsyncExitStack() as exits:
            exits.push_async_callback(self._audit.close)
            exits.push_async_callback(self._limiter.close)
            exits.push_async_callback(self._auth.close)
            policy = [self._in_force] if self._in_force else []
            await exits.enter_async_context(watching([*policy, *self._auth.files, *self._limiter.files]))
            yield

    @property
    def problem(self) -> str | None:
        """Why requests cannot be recorded at present, for the readiness answer.

        A slip in a policy, keys or limits file is not among the reasons: the version before it stays in force and the
        log tells of it, while a readiness answer would take every replica out of service at once.
        """
        return self._audit.problem

    @property
    def amiss(self) -> dict[str, str]:
        """What is not as the operator wants it, such as a file that is wrong now; the reason may name any tenant."""
        policy = [self._in_force] if self._in_force else []
        files = {"policy": policy, "keys": self._auth.files, "limits": self._limiter.files}
        reasons = {name: file.problem for name, one in files.items() for file in one}
        reasons["counters"] = self._limiter.problem
        return {name: reason for name, reason in reasons.items() if reason}

    def policies_of(self, tenant: str) -> dict[Route, Policy]:
        """What is in force for a tenant on each route."""
        return {route: self._policies.of(tenant, route) for route in Route}

    async def recent(self, tenant: str, limit: int, before: Place | None = None) -> list[AuditRow]:
        """A tenant's latest audit rows, or the latest ``before`` one; the latest first. Raises SQLAlchemyError."""
        return await asyncio.to_thread(self._audit.store.recent, limit, tenant, before)

    async def visit(self, headers: Mapping[str, str], request_id: str, route: Route) -> Visit:
        """Who asks, and the policy for them; raises Unauthorized, or UpstreamUnavailable when it cannot be checked."""
        identity = await self._auth.identify(headers)
        return Visit(request_id, identity, route, self._policies.of(identity.tenant, route))

    @asynccontextmanager
    async def recorded(self, visit: Visit) -> AsyncIterator[None]:
        """Write the visit's record at the end of the block, however it ends.

        Raises:
            UpstreamUnavailable: the record cannot be written; then nothing may be answered.
        """
        self._audit.require()
        with self.live.at_work(visit):
            try:
                yield
            except BaseException as stop:
                with suppress(FedwardError):  # the audit has put the record into the log
                    await self._record(visit, _code(stop))
                raise
            await self._record(visit, None)

    @asynccontextmanager
    async def admitted(self, visit: Visit, asked: Asked) -> AsyncIterator[None]:
        """Count a request inside the block.

        Raises:
            UnknownModel: the policy does not allow the model.
            QuotaExceeded: the tenant has used up a limit.
            UpstreamUnavailable: the counters cannot be reached.
        """
        if not visit.policy.allows_model(asked.model):
            raise UnknownModel("model: the policy allows no model of this name here", param="model")
        visit.model = asked.model
        visit.prompt = "\n".join(turn.text for turn in asked.turns if turn.kind is Kind.ASKED)
        characters = sum(len(turn.text) for turn in asked.turns)
        async with self.counted(visit, characters, (asked.answer_tokens or LIKELY_ANSWER) * asked.choices):
            yield

    @asynccontextmanager
    async def counted(self, visit: Visit, characters: int, answer_tokens: int = 0) -> AsyncIterator[None]:
        """Count a request, with the tokens that so many characters and its answer are likely to take.

        Raises:
            QuotaExceeded, UpstreamUnavailable: as ``admitted``.
        """
        likely = estimate_tokens(characters, answer_tokens)
        async with self._limiter.admit(visit.identity.tenant, likely) as grant:
            visit.headers.update(grant.headers)
            try:
                yield
            finally:
                # Not every answer tells what it took; then what has left counts, and at least what was reserved.
                left = estimate_tokens(characters + sum(map(len, visit.released)), 0)
                grant.used(max(likely, left) if visit.tokens is None else visit.tokens)

    @property
    def _policies(self) -> PolicySet:
        return self._in_force.current if self._in_force else self._uniform

    async def _record(self, visit: Visit, error: str | None) -> None:
        record = visit.record(self._audit.prompt_hash(visit.prompt), error)
        await self._audit.record(record, prompt=visit.prompt, answer="".join(visit.released))


def policy_of_settings(settings: GatewaySettings) -> Policy:
    """The policy of everybody, for a gateway without a policy file."""
    return Policy(
        check_deadline_ms=settings.check_deadline_ms,
        stream=StreamPolicy(max_characters=settings.unit_characters, idle_ms=settings.unit_idle_ms),
        prompt=PromptPolicy(threshold=settings.prompt_threshold),
        response=DirectionPolicy(threshold=settings.response_threshold),
    )


def _code(stop: BaseException) -> str:
    if isinstance(stop, FedwardError):
        return stop.code
    left = isinstance(stop, ClientLeft | asyncio.CancelledError | GeneratorExit)
    return "client_left" if left else "internal_error"
