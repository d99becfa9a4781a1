"""The trainer: federated rounds, curation, the Constitutional AI stage, and the miniature model's pretraining."""
