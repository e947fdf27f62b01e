"""The gateway: one OpenAI-compatible endpoint in front of every model, and the scheduler's hands."""
