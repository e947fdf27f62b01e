"""mmd, the multi-model daemon: many large models on one machine's GPUs behind one OpenAI-compatible endpoint."""

__version__ = "0.1.0"
