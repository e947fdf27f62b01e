"""The embedded engine: the API of vLLM, OpenAI, Anthropic and llama.cpp; a load time and a memory footprint, but no model."""
