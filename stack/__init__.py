"""The whole stack on one machine: ``make up``, ``make demo`` and ``make results``.

It meets the other components as a user would: by their commands, over HTTP, and through their files.
"""
