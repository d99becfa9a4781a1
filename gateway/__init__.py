"""The gateway: every prompt and every answer is checked, and nothing unchecked leaves.

Reading order: ``pipeline.py`` (how a request flows), ``policy.py`` (what a verdict leads to), ``checks.py`` (what is
put before the classifier), ``streaming.py`` (how a streamed answer is cut, checked and held), ``upstreams.py`` (the
services behind), ``chat.py`` and ``answers.py`` (what comes in, what goes out), ``app.py`` (the routes).
"""
