"""Draft answers of a model behind the inference service, through Hugging Face's TGI and OpenAI client."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2  # what huggingface_hub speaks; its errors are not wrapped
from huggingface_hub import InferenceClient, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from services.contracts.errors import UpstreamRejected, UpstreamUnavailable

UPSTREAM = "inference"
PARALLEL_REQUESTS = 16
ATTEMPTS = 4


def draft_answers(
    prompts: Sequence[str], *, url: str, model: str, max_tokens: int, seed: int, timeout_seconds: float
) -> list[str]:
    """One greedy answer per prompt, in order; the service batches what arrives together.

    Raises:
        UpstreamUnavailable: the service did not answer within its retries.
        UpstreamRejected: it refused a request.
    """
    client = InferenceClient(base_url=f"{url.rstrip('/')}/v1", timeout=timeout_seconds)

    def draft(prompt: str) -> str:
        try:
            answer = client.chat_completion(
                [{"role": "user", "content": prompt}], model=model, max_tokens=max_tokens, temperature=0.0, seed=seed
            )
        except HfHubHTTPError as error:
            status = error.response.status_code
            kind = UpstreamUnavailable if status == 429 or status >= 500 else UpstreamRejected
            raise kind(UPSTREAM, f"HTTP {status}: {error.server_message or error.response.reason_phrase}") from error
        except httpx2.HTTPError as error:
            raise UpstreamUnavailable(UPSTREAM, str(error) or type(error).__name__) from error
        return answer.choices[0].message.content or ""

    retrying = Retrying(
        retry=retry_if_exception_type(UpstreamUnavailable),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(multiplier=0.5, max=8.0, jitter=0.25),
        reraise=True,
    )
    with _own_services_reachable(), ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
        return list(pool.map(lambda prompt: retrying.copy()(draft, prompt), prompts))


@contextmanager
def _own_services_reachable() -> Iterator[None]:
    """Lift ``HF_HUB_OFFLINE`` for the calls inside: the client forbids itself every request, not only the Hub's."""

    def without_offline_hook() -> httpx2.Client:
        client = default_client_factory()
        client.event_hooks = {}
        return client

    set_client_factory(without_offline_hook)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
