"""Speed of the safety service beside a plain ``transformers`` pipeline: ``python -m services.safety bench``.

Both score the same texts of our own, in turns and in several rounds of one run: a machine's speed drifts, the ratio of
neighbours does not. The pipeline is what people write: the same base encoder with a new head on one torch thread.
"""

import argparse
import asyncio
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.progress import track

from services.common.benchmarks import Running, provenance, running_service, write_figures
from services.contracts.verdicts import ClassifierInfo
from services.safety.embedded.encoder import load_tokenizer
from services.safety.embedded.encoder_build import find_base
from services.safety.training.bench_report import PIPELINE, SEED, SERVICE, Measurement, Meter, ratios, table
from services.safety.training.wording import own_prompts

READY_SECONDS = 120.0
LIBRARIES = ("numpy", "onnxruntime", "tokenizers", "torch", "transformers", "httpx", "uvicorn")


def main(argv: Sequence[str]) -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m services.safety bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often everything is measured (default: 5)")
    parser.add_argument("--texts", type=int, default=128, help="texts of each length (default: 128)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256], help="lengths (16 64 256)")
    parser.add_argument("--base", type=Path, help="folder of the base encoder (default: the installed package)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/safety.json"), help="where the figures go")
    parser.add_argument("flags", nargs="*", help="after --, flags of the service, such as --tier ngram")
    arguments = parser.parse_args(argv)
    if min(arguments.rounds, arguments.texts, *arguments.tokens) < 1:
        parser.error("--rounds, --texts and --tokens are whole numbers above 0")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by default it would leave the service behind
    base = find_base(arguments.base)
    texts = {tokens: make_texts(base, tokens, arguments.texts) for tokens in arguments.tokens}
    pipeline = load_pipeline(base)
    log = arguments.out.with_suffix(".log")
    with running_service(
        "services.safety",
        arguments.flags,
        log,
        patience_seconds=READY_SECONDS,
        environment={"OMP_NUM_THREADS": "1"},
    ) as service:
        model = ClassifierInfo.model_validate(httpx.get(f"{service.url}/v1/model").raise_for_status().json())
        print(
            f"{model.model_id}, tier {model.tier}; {arguments.texts} texts of each length, {arguments.rounds} rounds",
            flush=True,
        )
        measured = measure(service, pipeline, texts, arguments.rounds)
        summary = provenance(LIBRARIES, seeds={"texts": SEED, "head": SEED}) | {
            "command": shlex.join(["python", "-m", "services.safety", "bench", *argv]),
            "model": model.model_dump(include={"model_id", "tier", "sha256"}),
            "texts": arguments.texts,
            "service": {
                "ready_seconds": service.ready_seconds,
                "rss_mb": psutil.Process(service.pid).memory_info().rss / 1e6,
            },
            "pipeline": {"rss_mb": psutil.Process().memory_info().rss / 1e6},
            "ratios": ratios(measured),
            "measurements": [asdict(one) for one in measured],
        }
    print(table(summary))
    write_figures(arguments.out, summary)
    return 0


def make_texts(base: Path, tokens: int, count: int) -> list[str]:
    """Texts of our own wording, always the same, each cut to about ``tokens`` tokens and BERT's two special ones."""
    rng, tokenizer = random.Random(f"{SEED} {tokens}"), load_tokenizer(base)
    sentences = [row.text for row in own_prompts(SEED)]
    texts: list[str] = []
    while len(texts) < count:
        text = rng.choice(sentences)
        while len(encoding := tokenizer.encode(text, add_special_tokens=False)) < tokens:
            text += " " + rng.choice(sentences)
        texts.append(text[: encoding.offsets[tokens - 1][1]])
    return texts


def load_pipeline(base: Path) -> Any:
    """A text-classification pipeline as people write it, with a new head on the base encoder."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns that the head is new
    model = transformers.BertForSequenceClassification.from_pretrained(base)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")


def measure(service: Running, pipeline: Any, texts: dict[int, list[str]], rounds: int) -> list[Measurement]:
    """Every way on every length in every round; which side goes first changes with the round."""
    cells = [
        (number, tokens, way)
        for number in range(rounds)
        for tokens in texts
        for way in (SERVICE + PIPELINE if number % 2 == 0 else PIPELINE + SERVICE)
    ]
    found = []
    for number, tokens, way in track(cells, "measuring", console=Console(stderr=True)):
        count = len(texts[tokens])
        calls = [texts[tokens][start : start + way.batch] for start in range(0, count, way.batch)]
        if way in SERVICE:
            meter = asyncio.run(_ask_service(service, calls, way.concurrency))
        else:
            meter = _ask_pipeline(pipeline, calls, way.batch)
        p50, p95 = (float(seconds) * 1e3 for seconds in np.percentile(meter.latencies, [50, 95]))
        cpu_ms = meter.cpu_seconds / count * 1e3
        found.append(Measurement(number, tokens, way.name, count / meter.seconds, cpu_ms, p50, p95))
    return found


async def _ask_service(service: Running, calls: Sequence[list[str]], concurrency: int) -> Meter:
    """Every call once; each worker has a client of its own, since one pool for 16 costs more than the requests."""
    meter, rest = Meter(psutil.Process(service.pid)), iter(calls)

    async def work(client: httpx.AsyncClient, calls: Iterable[list[str]]) -> None:
        for texts in calls:
            began = time.perf_counter()
            answer = await client.post("/v1/classify", json={"items": [{"prompt": text} for text in texts]})
            answer.raise_for_status()
            meter.latencies.append(time.perf_counter() - began)

    async with AsyncExitStack() as exits:
        new = [httpx.AsyncClient(base_url=service.url, timeout=60.0) for _ in range(concurrency)]
        clients = [await exits.enter_async_context(client) for client in new]
        await asyncio.gather(*(work(client, [calls[0][:1]]) for client in clients))  # opens the connections
        meter.latencies.clear()
        with meter:
            await asyncio.gather(*(work(client, rest) for client in clients))
    return meter


def _ask_pipeline(pipeline: Any, calls: Sequence[list[str]], batch: int) -> Meter:
    pipeline(calls[0][:1])
    with Meter(psutil.Process()) as meter:
        for texts in calls:
            began = time.perf_counter()
            pipeline(texts[0] if batch == 1 else texts, batch_size=batch)
            meter.latencies.append(time.perf_counter() - began)
    return meter


def _rss_mb(pid: int) -> float:
    return float(psutil.Process(pid).memory_info().rss / 1e6)
