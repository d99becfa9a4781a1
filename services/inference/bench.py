"""Speed of the service beside one-at-a-time ``transformers`` generation: ``python -m services.inference bench``.

Both write greedy answers to the same prompts with the same model, in turns and in several rounds of one run: a
machine's speed drifts, the ratio of neighbours does not. The peer is what people write: ``model.generate`` in a loop.
"""

import argparse
import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from services.common.benchmarks import provenance, running_service, write_figures
from services.contracts.chat import ChatCompletion, ChatMessage
from services.inference.bench_report import LEVELS, Measurement, ratios, table
from services.inference.model import BaseModel, load_base
from services.inference.settings import InferenceSettings

READY_SECONDS = 300.0
LIBRARIES = ("torch", "transformers", "tokenizers", "fastapi", "httpx", "uvicorn")
TASKS = (
    "bake bread", "keep tomato plants healthy", "learn to swim", "plan a walk in the hills", "paint a wooden fence",
    "choose a bicycle", "write a letter to a friend", "clean a kettle", "find a good book", "sleep well",
    "cook rice", "look after a cat",
)  # fmt: skip
WORDINGS = ("How do I {}?", "Give me three tips: how to {}.", "Explain to a child how to {}.", "What helps to {}?")
PROMPTS = [wording.format(task) for task in TASKS for wording in WORDINGS]


@dataclass(frozen=True)
class Written:
    """The answers to all prompts, in order, with the tokens they took and the seconds they lasted."""

    texts: list[str]
    tokens: int
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m services.inference bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="prompts of a measurement (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--model", help="folder or Hub name; the shipped miniature by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of either side (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/inference.json"), help="where the figures go")
    options = parser.parse_args(argv)
    if min(options.rounds, options.prompts, options.max_tokens, options.threads) < 1:
        parser.error("--rounds, --prompts, --max-tokens and --threads are whole numbers above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by default it would leave the service behind
    prompts = [PROMPTS[n % len(PROMPTS)] for n in range(options.prompts)]
    base = load_base(InferenceSettings(model=options.model, threads=options.threads))
    flags = ["--threads", str(options.threads), *(["--model", options.model] if options.model else [])]
    log = options.out.with_suffix(".log")
    with running_service("services.inference", flags, log, patience_seconds=READY_SECONDS, environment={}) as service:
        measured, alike = measure(service.url, base, prompts, options.max_tokens, options.rounds)
    # Nothing is drawn, so there are no seeds: both sides are greedy, on fixed prompts.
    summary = provenance(LIBRARIES, seeds={}) | {
        "command": shlex.join(["python", "-m", "services.inference", "bench", *argv]),
        "model": {"model_id": base.model_id, "sha256": base.sha256, "device": base.network.device.type},
        "prompts": len(prompts),
        "max_tokens": options.max_tokens,
        "threads": options.threads,
        "same_answers": alike,
        "ratios": ratios(measured),
        "measurements": [asdict(one) for one in measured],
    }
    print(table(summary))
    write_figures(options.out, summary)
    return 0


def measure(
    url: str, base: BaseModel, prompts: Sequence[str], max_tokens: int, rounds: int
) -> tuple[list[Measurement], float]:
    """Every level of concurrency, and the peer, in every round; the order turns with the round.

    Returns:
        The measurements, and the share of the service's answers that are the peer's to the letter.
    """
    generate_all(base, prompts[:1], max_tokens)  # what is set up on first use
    found, same, answers = [], 0, 0
    for number in range(rounds):
        levels = (0, *LEVELS) if number % 2 == 0 else (*reversed(LEVELS), 0)
        written = {}
        for level in levels:
            print(
                f"round {number + 1} of {rounds}, " + (f"{level} at a time" if level else "generate"), file=sys.stderr
            )
            if level:
                written[level] = asyncio.run(ask_all(url, prompts, max_tokens, level))
            else:
                written[level] = generate_all(base, prompts, max_tokens)
            one = written[level]
            found.append(Measurement(number, level, one.tokens, one.seconds, one.tokens / one.seconds))
        for level in LEVELS:
            answers += len(prompts)
            same += sum(a == b for a, b in zip(written[level].texts, written[0].texts, strict=True))
    return found, same / answers


async def ask_all(url: str, prompts: Sequence[str], max_tokens: int, concurrency: int) -> Written:
    """The service's answers; each worker has a client of its own and asks again when it has its answer."""
    texts, tokens, rest = [""] * len(prompts), 0, iter(enumerate(prompts))

    async def work(client: httpx.AsyncClient) -> None:
        nonlocal tokens
        for place, prompt in rest:
            body = {"model": "fedward", "messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
            response = (await client.post("/v1/chat/completions", json=body)).raise_for_status()
            answer = ChatCompletion.model_validate_json(response.content)
            texts[place] = answer.choices[0].message.content or ""
            tokens += answer.usage.completion_tokens

    async with AsyncExitStack() as exits:
        new = [httpx.AsyncClient(base_url=url, timeout=300.0) for _ in range(concurrency)]
        clients = [await exits.enter_async_context(client) for client in new]
        await asyncio.gather(*(client.get("/health/live") for client in clients))  # opens the connections
        began = time.perf_counter()
        await asyncio.gather(*(work(client) for client in clients))
        return Written(texts, tokens, time.perf_counter() - began)


def generate_all(base: BaseModel, prompts: Sequence[str], max_tokens: int) -> Written:
    """The answers of ``transformers``' own generate, one after the other."""
    import torch

    network: Any = base.network
    texts, tokens = [], 0
    began = time.perf_counter()
    for prompt in prompts:
        prompt_ids = base.encoder.encode_chat([ChatMessage(role="user", content=prompt)])
        ids = torch.tensor([prompt_ids], device=network.device)
        output = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
            eos_token_id=sorted(base.end_ids),
            pad_token_id=0,
        )
        answer = output[0, len(prompt_ids) :].tolist()
        tokens += len(answer)
        texts.append(base.decode(answer))
    return Written(texts, tokens, time.perf_counter() - began)
