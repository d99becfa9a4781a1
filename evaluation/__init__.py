"""Evaluation: asks a target the same prompts for every arm and round, has the answers judged, and reports.

The main path is :func:`evaluation.run.evaluate`. The command line is ``python -m evaluation --help``.
"""
