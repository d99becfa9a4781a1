"""The gateway: every prompt and every answer is checked, and nothing unchecked leaves.

Reading order: ``pipeline.py`` (how a request flows), ``asked.py`` and ``answers.py`` (requests and answers in one shape
for all protocols), ``policy.py`` (what a verdict leads to), ``checks.py`` (what is put before the classifier),
``streaming.py`` and ``segments.py`` (how a streamed answer is cut, checked and held), ``upstreams.py`` (the services
behind), ``protocols`` (OpenAI chat, OpenAI text completions, TGI), ``app.py`` (the routes).
"""
