"""The miniature language model: corpus, tokenizer, pretraining and probes. Command: ``python -m trainer.miniature``."""
