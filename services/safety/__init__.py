"""The safety service: classifies prompts, responses and conversations for harm."""
