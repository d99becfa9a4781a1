"""The inference service: batched generation with hot-swapped adapters, over OpenAI's and TGI's protocols.

Reading order: ``app`` (routes), ``service`` (what a request becomes), ``engine`` (the worker thread), ``batch`` (the
decode loop), ``adapters`` and ``lora`` (releases). ``release`` is the command that releases here, on vLLM and on TGI.
"""
