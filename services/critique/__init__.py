"""The critique service: comments on drafts, revises them and compares answers, under a constitution.

Reading order: ``revise`` (the main path), ``prefer``, ``checks``, then the two backends behind ``backend``.
"""
