"""The embedded classifier: two tiers that need no accelerator, and what turns their scores into verdicts."""
