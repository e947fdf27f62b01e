"""The embedded engine: an OpenAI-compatible server with a load time, a memory footprint and a token rate, and no model."""
