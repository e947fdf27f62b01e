"""The client of the admin API: HTTP/1.1 over the gateway's Unix socket (mmd-gateway(8), ADMIN API)."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.http import ProtocolError, Response, request
from mmd.scope import ScopeKind
from mmd.status import ModelStatus, Progress, RequestStatus, Status, model_from_json

__all__ = ["Client", "DownError", "Happening", "Operation", "RefusedError", "Reloaded", "Verb"]

_MODELS = "/api/v1/models/"
_REQUESTS = "/api/v1/requests"
_RELOAD_TIMEOUT_S = 60.0
_REGISTER_TIMEOUT_S = 120.0
"""The gateway gives up before: after 30 s for the files and 60 s until they are in use."""


class Verb(StrEnum):
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    SLEEP = "sleep"
    WAKE = "wake"
    VERIFY = "verify"
    RESET = "reset"
    PIN = "pin"
    UNPIN = "unpin"


@dataclass(frozen=True, slots=True)
class Operation:
    """What to do with a model, and how; None and False leave it to the gateway."""

    verb: Verb
    level: int | None = None
    force: bool = False

    @property
    def body(self) -> dict[str, object]:
        options = {"level": self.level, "force": self.force or None}
        return {key: value for key, value in options.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload of the configuration did: names of models, and problems, which leave the old configuration in use."""

    changed: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Reloaded":
        return cls(*(tuple(map(str, raw.get(key, ()))) for key in ("changed", "added", "removed", "problems")))


class DownError(CtlError):
    """Nothing listens on the admin socket."""


class RefusedError(CtlError):
    """The gateway answered with an error; `status` is that of HTTP."""

    def __init__(self, message: str, *, status: int, exit_code: Exit) -> None:
        super().__init__(message, exit_code=exit_code)
        self.status = status


@dataclass(frozen=True, slots=True)
class Happening:
    """An event, as JSON (mmd.events), and the id to go on behind."""

    id: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Client:
    """Calls to one gateway. Every method raises CtlError: UNREACHABLE, NO_SUCH_MODEL or FAILED."""

    path: Path
    scope: ScopeKind = ScopeKind.SYSTEM
    answer_timeout_s: float = 10.0
    """Longer than a socket-activated gateway needs to start, short enough for a person who waits."""

    def status(self) -> Status:
        with self._call("GET", "/api/v1/status", timeout_s=self.answer_timeout_s) as response:
            return Status.from_json(json.loads(response.read()))

    def reload(self) -> Reloaded:
        """Makes the gateway read its configuration again."""
        with self._call("POST", "/api/v1/reload", timeout_s=_RELOAD_TIMEOUT_S) as response:
            return Reloaded.from_json(json.loads(response.read()))

    def requests(self) -> list[RequestStatus]:
        """The requests that are not over."""
        with self._call("GET", _REQUESTS, timeout_s=self.answer_timeout_s) as response:
            return [RequestStatus.from_json(raw) for raw in json.loads(response.read())["requests"]]

    def cancel(self, request: str) -> RequestStatus:
        """Ends a request: what it was."""
        path = f"{_REQUESTS}/{quote(request, safe='')}"
        with self._call("DELETE", path, timeout_s=self.answer_timeout_s) as response:
            return RequestStatus.from_json(json.loads(response.read()))

    def events(self, *, follow: bool, lines: int | None, last: str | None) -> Iterator[Happening]:
        """What has happened, the last `lines` of it or what came after the id `last`; with `follow` what comes as well, until
        the gateway goes. Then reads without a time-out."""
        query = {"follow": "true" if follow else None, "lines": None if lines is None else str(lines)}
        words = "&".join(f"{key}={value}" for key, value in query.items() if value is not None)
        headers = {} if last is None else {"Last-Event-ID": last}
        timeout_s = None if follow else self.answer_timeout_s
        with self._call("GET", f"/api/v1/events?{words}", headers=headers, timeout_s=timeout_s) as response:
            fields: dict[str, str] = {}
            for line in response.lines():
                name, _, value = line.decode().partition(": ")
                if name:
                    fields[name] = value
                    continue
                if "data" in fields:
                    yield Happening(fields.get("id", ""), json.loads(fields["data"]))
                fields = {}

    def add(self, models: Mapping[str, object], *, replace: bool) -> tuple[list[ModelStatus], list[str]]:
        """Registers models and waits until they are in use: what they are, and the files that define them."""
        path = f"{_MODELS[:-1]}?replace={str(replace).lower()}"
        with self._call("POST", path, body={"models": models}, timeout_s=_REGISTER_TIMEOUT_S) as response:
            answer = json.loads(response.read())
            return [model_from_json(model) for model in answer["models"]], [str(file) for file in answer["files"]]

    def remove(self, model: str, *, force: bool) -> list[str]:
        """Takes a model out of the configuration and waits until it is out of use: the files that are gone."""
        path = f"{_MODELS}{quote(model, safe='')}?force={str(force).lower()}"
        with self._call("DELETE", path, timeout_s=_REGISTER_TIMEOUT_S) as response:
            return [str(file) for file in json.loads(response.read())["files"]]

    def operate(self, model: str, operation: Operation) -> Iterator[Progress]:
        """Begins `operation` and yields how it goes, the line with `done` last. Reads without a time-out: a model may load
        for minutes. Leaving the iterator does not stop what was begun."""
        path = f"{_MODELS}{quote(model, safe='')}/{operation.verb}"
        with self._call("POST", path, body=operation.body, timeout_s=None) as response:
            for line in response.lines():
                progress = Progress.from_json(json.loads(line))
                yield progress
                if progress.done:
                    return
        raise self._lost(f"mmd-gateway went away; {model} goes on without it")

    def put_keys(self, text: str) -> None:
        """Gives the gateway the text of the API keys' file, in place of the one that it has."""
        with self._call("PUT", "/api/v1/keys", body=text, timeout_s=self.answer_timeout_s) as response:
            response.read()

    @contextmanager
    def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, object] | str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None,
    ) -> Iterator[Response]:
        """`body`: text is YAML (RFC 9512), a mapping goes as JSON."""
        content = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        kind = {"Content-Type": f"application/{'yaml' if isinstance(body, str) else 'json'}"} if content else {}
        headers = {**(headers or {}), **kind}
        try:
            with request(self.path, method, path, headers=headers, body=content, timeout_s=timeout_s) as response:
                if response.status >= 400:
                    raise _refusal(response, about_model=path.startswith(_MODELS))
                yield response
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise self._down() from error
        except PermissionError as error:
            raise self._denied() from error
        except TimeoutError as error:
            raise self._lost("mmd-gateway did not answer in time") from error
        except (OSError, ProtocolError) as error:
            raise self._lost(f"cannot talk to mmd-gateway at {self.path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise self._lost(f"mmd-gateway's answer to {method} {path} is not understood: {error!r}") from error

    def _down(self) -> DownError:
        units = "mmd-gateway.socket mmd-admin.socket"
        hint = f"{self._tool('systemctl')} start {units}"
        return DownError(f"mmd-gateway is not running: nothing listens on {self.path}", hint=hint, exit_code=Exit.UNREACHABLE)

    def _denied(self) -> CtlError:
        hint = "join group mmd-admin (usermod -aG mmd-admin $USER) or use sudo"
        return CtlError(f"permission denied: {self.path}", hint=hint, exit_code=Exit.UNREACHABLE)

    def _lost(self, message: str) -> CtlError:
        return CtlError(message, hint=f"{self._tool('journalctl')} -u mmd-gateway", exit_code=Exit.UNREACHABLE)

    def _tool(self, name: str) -> str:
        return f"{name} --user" if self.scope is ScopeKind.USER else name


def _refusal(response: Response, *, about_model: bool) -> RefusedError:
    """The error that an answer in the OpenAI error shape says, or as much as another answer tells."""
    text = response.read().decode(errors="replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"mmd-gateway answered {response.status} {response.reason}"
    exit_code = Exit.NO_SUCH_MODEL if about_model and response.status == 404 else Exit.FAILED
    return RefusedError(message, status=response.status, exit_code=exit_code)
