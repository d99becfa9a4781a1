"""Data files of the evaluation: built-in prompts in Fedward's own wording, and the paper-compatible refusal strings."""
