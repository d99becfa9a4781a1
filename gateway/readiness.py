"""Whether the gateway can serve: it cannot when the classifier or the model cannot."""

import asyncio
import time

from gateway.admission import Admission
from gateway.upstreams import INFERENCE, SAFETY, Upstreams

PROBE_SECONDS = 1.0
KEPT_SECONDS = 1.0


class Readiness:
    """Asks both services whether they are ready, at most once a second however often it is asked itself."""

    def __init__(self, upstreams: Upstreams, admission: Admission) -> None:
        self._upstreams = upstreams
        self._admission = admission
        self._lock = asyncio.Lock()
        self._reason: str | None = None
        self._asked_at = float("-inf")

    async def __call__(self) -> str | None:
        """None when both are ready and nothing of the gateway's own is amiss, else the reason in words."""
        async with self._lock:
            if time.monotonic() - self._asked_at > KEPT_SECONDS:
                reasons = await asyncio.gather(
                    *(self._upstreams.problem(name, PROBE_SECONDS) for name in (SAFETY, INFERENCE))
                )
                self._reason = "; ".join(reason for reason in (*reasons, self._admission.problem) if reason) or None
                self._asked_at = time.monotonic()
            return self._reason
