"""What schemathesis loads for tests/unit/test_admin_schema.py: streams that would never end are asked to."""

from typing import Any

import schemathesis

__all__ = ["end_streams"]


@schemathesis.hook("before_call")
def end_streams(context: schemathesis.HookContext, case: "schemathesis.Case[Any]", kwargs: dict[str, Any]) -> None:
    del context, kwargs
    query: dict[str, Any] = case.query or {}
    if query.get("follow") in (True, "true"):
        query["follow"] = "false"
