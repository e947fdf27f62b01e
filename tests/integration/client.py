"""A plain HTTP client for the tests: one connection per call unless told otherwise, nothing hidden."""

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Answer", "chat", "get", "post", "stream"]

_API = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that must be one, in OpenAI's shape."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        return error


def _connect(api: str, timeout_s: float) -> http.client.HTTPConnection:
    where = urlsplit(api)
    assert where.hostname is not None
    return http.client.HTTPConnection(where.hostname, where.port, timeout=timeout_s)


def post(path: str, body: object, *, api: str = _API, timeout_s: float = 30, headers: dict[str, str] | None = None) -> Answer:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = _connect(api, timeout_s)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())
    finally:
        connection.close()


def get(path: str, *, api: str = _API, timeout_s: float = 30, headers: dict[str, str] | None = None) -> Answer:
    connection = _connect(api, timeout_s)
    try:
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode())
    finally:
        connection.close()


def chat(model: str, text: str = "hello", *, timeout_s: float = 30, **more: object) -> Answer:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, **more}
    return post("/v1/chat/completions", body, timeout_s=timeout_s)


def stream(
    model: str, *, max_tokens: int = 8, timeout_s: float = 30, headers: dict[str, str] | None = None, **more: object
) -> Iterator[str]:
    """The lines of a streamed chat answer, as they come. Closing the iterator closes the connection."""
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True, **more}
    connection = _connect(_API, timeout_s)
    try:
        fields = {"Content-Type": "application/json", **(headers or {})}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), fields)
        answer = connection.getresponse()
        assert answer.status == 200, (answer.status, answer.read())
        while line := answer.readline():
            yield line.decode().rstrip("\n")
    finally:
        connection.close()
