"""Leak test: an answer that turns unsafe in its middle, and an unsafe prompt. Which characters reach the client?

The 26th of 60 words, which come 20 ms apart, is the marker; the mock classifier calls unsafe what contains it.
"""

from typing import Any

import aiohttp

from gateway.bench.client import PROMPT, ask
from gateway.bench.gateways import Gateway, describe
from gateway.bench.script import MARKER, Script
from gateway.bench.services import MockServices

PATIENCE = 45.0
UNSAFE = Script(words=60, word_seconds=0.02, sentences=False, marker_at=25)
SAFE = UNSAFE.model_copy(update={"marker_at": None})
ANSWERS: dict[str, Script] = {
    "stream": UNSAFE,
    "stream_of_sentences": UNSAFE.model_copy(update={"sentences": True}),
    "stream_marker_in_two_pieces": UNSAFE.model_copy(update={"marker_split": True}),
    "stream_marker_is_last_word": UNSAFE.model_copy(update={"marker_at": 59}),
    "stream_marker_in_reasoning": UNSAFE.model_copy(update={"marker_field": "reasoning_content"}),
    "stream_marker_in_tool_call": UNSAFE.model_copy(update={"marker_field": "tool_calls"}),
}
WHOLE = ("stream", "stream_marker_in_reasoning", "stream_marker_in_tool_call")
QUICK_SECONDS = 0.002


async def leaks(gateway: Gateway, services: MockServices, *, quick: bool = False) -> dict[str, Any]:
    """Every mode, and the stream again in each other setting of the peer; ``characters_leaked`` is the worst mode."""
    pause = {"word_seconds": QUICK_SECONDS} if quick else {}
    modes: dict[str, Any] = {}
    variants: dict[str, Any] = {}
    async with aiohttp.ClientSession() as session:

        async def run(script: Script, target: Any, stream: bool, prompt: str = PROMPT) -> dict[str, Any]:
            services.follow(script.model_copy(update=pause))
            answer = await ask(session, target, PATIENCE, stream=stream, prompt=prompt)
            counters = services.counters()
            return {
                "characters_leaked": answer.leaked(script, prompt_is_unsafe=script is SAFE),
                "marker_came": MARKER.encode() in answer.raw,
                **describe(answer),
                "generations": counters.generations,
                "checks": counters.checks,
                "check_bytes": counters.check_bytes,
            }

        for name, script in ANSWERS.items():
            modes[name] = await run(script, gateway.target, True)
        for name in WHOLE:
            modes[name.replace("stream", "whole")] = await run(ANSWERS[name], gateway.target, False)
        for name, stream in (("stream_prompt", True), ("whole_prompt", False)):
            modes[name] = await run(SAFE, gateway.target, stream, f"{PROMPT} {MARKER}")
        for name, target in gateway.variants.items():
            variants[name] = await run(UNSAFE, target, True)
    worst = max(mode["characters_leaked"] for mode in modes.values())
    return {
        "characters_leaked": worst,
        "characters_leaked_stream": modes["stream"]["characters_leaked"],
        "modes": modes,
        "other_settings": variants,
    }
