"""What answers a request: the embedded classifier, a guard model, or the one with the other behind it."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

from services.contracts.errors import Overloaded, RequestError
from services.contracts.verdicts import ClassifierInfo, Outcome, Verdict
from services.safety.batching import MicroBatcher
from services.safety.calibration import Calibration, PointName
from services.safety.embedded.classifier import EmbeddedClassifier, score_windows
from services.safety.guard.base import Guard
from services.safety.items import Conversation


class Backend(Protocol):
    """A classifier behind the service's routes."""

    def info(self) -> ClassifierInfo:
        """Which classifier it is, at which thresholds, measured how."""
        ...

    async def classify(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict for each conversation, in order; raises Overloaded or RequestError."""
        ...

    async def start(self) -> None:
        """Get ready to classify, on the loop that requests will be served on."""
        ...

    async def ready(self) -> str | None:
        """None when it can classify, else the reason why not."""
        ...

    async def aclose(self) -> None:
        """Finish what is under way and let go of threads and connections."""
        ...


class Limits(NamedTuple):
    """How much work a backend takes on; a guard model heeds ``requests`` and ``deadline_seconds`` only.

    Args:
        requests: most requests under way.
        characters: most characters in a request; one thread reads all texts, so a long one holds the others up.
        queue_windows: most windows waiting, over all requests; a request that needs more is refused.
        batch_windows: most windows in a batch.
        batch_tokens: most tokens in a batch, padding included; it bounds memory.
        deadline_seconds: how long a request may take.
        threads: batches at work at the same time.
    """

    requests: int = 256
    characters: int = 1_500_000
    queue_windows: int = 8192
    batch_windows: int = 16
    batch_tokens: int = 2048
    deadline_seconds: float = 30.0
    threads: int = 1


class Admission:
    """A bound on the requests under way, and on the time that each may take."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.requests
        self._deadline = limits.deadline_seconds
        self._requests = 0

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place for one request; raises Overloaded when there is none, or when it is not left in time."""
        if self._requests >= self._limit:
            raise Overloaded(f"{self._requests} requests are under way, the limit is {self._limit}; try again later")
        self._requests += 1
        try:
            async with asyncio.timeout(self._deadline):
                yield
        except TimeoutError as error:
            raise Overloaded(f"no verdict within {self._deadline:g} seconds; send less at once, or later") from error
        finally:
            self._requests -= 1


class EmbeddedBackend:
    """The embedded classifier, its windows batched over requests; the event loop stays free."""

    def __init__(self, classifier: EmbeddedClassifier, limits: Limits) -> None:
        self._classifier = classifier
        self._deadline = limits.deadline_seconds
        self._most_characters = limits.characters
        self._admission = Admission(limits)
        self._batcher = MicroBatcher(
            classifier.scorer.run,
            queue_windows=limits.queue_windows,
            batch_windows=limits.batch_windows,
            batch_tokens=limits.batch_tokens,
            threads=limits.threads,
        )
        # Reading texts is Python and holds the interpreter's lock: more threads would only take turns.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")

    def info(self) -> ClassifierInfo:
        """The classifier's own."""
        return self._classifier.info()

    async def classify(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict for each conversation; raises Overloaded when too much waits, or when it takes too long."""
        self._refuse_long(conversations)
        async with self._admission.place():
            loop = asyncio.get_running_loop()
            plan = await loop.run_in_executor(self._reader, self._classifier.plan, conversations)
            windows = plan.windows
            scores = await self._batcher.submit(windows, self._deadline) if windows else self._classifier.no_scores()
            return self._classifier.verdicts(plan, scores)

    def _refuse_long(self, conversations: Sequence[Conversation]) -> None:
        characters = sum(len(turn.content or "") for conversation in conversations for turn in conversation.turns)
        if characters > self._most_characters:
            raise RequestError(
                f"the request has {characters} characters and at most {self._most_characters} are taken; send less"
            )

    async def start(self) -> None:
        """Classify something long, so that the first request finds everything loaded."""
        scorer = self._classifier.scorer
        windows = scorer.windows("warm up " * 200)
        # Past the batcher: limits and deadline are for requests, and a cold first batch may take longer.
        await asyncio.get_running_loop().run_in_executor(self._reader, score_windows, scorer, windows)

    async def ready(self) -> str | None:
        """Always: it is warm before the service listens."""
        return None

    async def aclose(self) -> None:
        """Finish the batches at work."""
        self._batcher.close()
        self._reader.shutdown(wait=True, cancel_futures=True)


class GuardBackend:
    """A guard model alone."""

    tier = "guard model"

    def __init__(
        self, guard: Guard, calibration: Calibration | None, point: PointName, limits: Limits | None = None
    ) -> None:
        self._guard = guard
        self._calibration = calibration
        self._point = point
        self._admission = Admission(limits or Limits())

    def info(self) -> ClassifierInfo:
        """The guard model by name; its weights are not at hand, so ``sha256`` is that of its name and family."""
        return ClassifierInfo(
            model_id=self._guard.model_id,
            tier=self.tier,
            sha256=self._guard.identity,
            threshold=self._guard.thresholds.prompt,
            response_threshold=self._guard.thresholds.response,
            operating_point=self._point if self._calibration else None,
            calibration=self._calibration.info(self._point) if self._calibration else None,
        )

    async def classify(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """One verdict for each conversation; raises Overloaded when too much waits, or when it takes too long.

        The guard bounds how many conversations are asked about at a time.
        """
        async with self._admission.place():
            return await asyncio.gather(*(self._guard.classify(conversation.turns) for conversation in conversations))

    async def start(self) -> None:
        """Nothing: the guard model may come up later, and readiness says so until then."""

    async def ready(self) -> str | None:
        """Whether the guard model can be asked."""
        return await self._guard.ready()

    async def aclose(self) -> None:
        """Let go of the guard model."""
        await self._guard.aclose()


class Band(NamedTuple):
    """The scores of the embedded classifier that the guard model decides: ``low`` <= score < ``high``."""

    low: float
    high: float


class Cascade:
    """The embedded classifier decides the clear cases, a guard model those in an uncertain band.

    A case whose guard model gives no verdict stays ``unscored``: it was uncertain, so the first verdict cannot stand.
    """

    def __init__(self, first: Backend, second: Backend, band: Band) -> None:
        self._first = first
        self._second = second
        self._band = band

    def info(self) -> ClassifierInfo:
        """Both models by name. It has no calibration of its own until one was made for exactly this pair and band."""
        first, second = self._first.info(), self._second.info()
        identity = f"{first.sha256} {second.sha256} {self._band.low!r} {self._band.high!r}"
        return first.model_copy(
            update={
                "model_id": f"{first.model_id} > {second.model_id}",
                "tier": f"cascade of {first.tier} and {second.tier}",
                "sha256": hashlib.sha256(identity.encode()).hexdigest(),
                "calibration": None,
                "operating_point": None,
            }
        )

    async def classify(self, conversations: Sequence[Conversation]) -> list[Verdict]:
        """First verdicts for all, second ones for those in the band."""
        verdicts = await self._first.classify(conversations)
        uncertain = [number for number, verdict in enumerate(verdicts) if self._is_uncertain(verdict)]
        if not uncertain:
            return verdicts
        second = await self._second.classify([conversations[number] for number in uncertain])
        for number, verdict in zip(uncertain, second, strict=True):
            verdicts[number] = _combined(verdicts[number], verdict)
        return verdicts

    async def start(self) -> None:
        """Start both."""
        await self._first.start()
        await self._second.start()

    async def ready(self) -> str | None:
        """Whether both can classify."""
        return await self._first.ready() or await self._second.ready()

    async def aclose(self) -> None:
        """Close both."""
        await self._first.aclose()
        await self._second.aclose()

    def _is_uncertain(self, verdict: Verdict) -> bool:
        """What the embedded model could not read goes to the guard model too."""
        return verdict.score is None or self._band.low <= verdict.score < self._band.high


def _combined(first: Verdict, second: Verdict) -> Verdict:
    """The guard model's verdict, with the first one's categories and refusal where the guard model names none."""
    if second.outcome is Outcome.UNSCORED:
        return second
    return second.model_copy(
        update={
            "categories": second.categories or first.categories,
            "refused": first.refused if second.refused is None else second.refused,
        }
    )
