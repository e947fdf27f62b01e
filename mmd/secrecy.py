"""Which settings hold secrets, and what is shown in place of their values (pure)."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["HIDDEN", "hide_secrets", "looks_secret"]

HIDDEN = "(hidden)"

_SECRET = re.compile(r"TOKEN(?!IZ)|KEY|SECRET|PASSWORD", re.IGNORECASE)  # TOKENIZERS_PARALLELISM is none


def looks_secret(name: str) -> bool:
    """Whether an environment variable of this name is likely to hold a secret: HF_TOKEN, OPENAI_API_KEY."""
    return _SECRET.search(name) is not None


def hide_secrets(env: Mapping[str, Any]) -> dict[str, Any]:
    """A model's `env` as it may be shown."""
    return {name: HIDDEN if looks_secret(name) else value for name, value in env.items()}
