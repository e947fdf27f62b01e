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
from mmd.status import Progress, Status

__all__ = ["Client", "DownError", "Operation", "RefusedError", "Reloaded", "Verb"]

_MODELS = "/api/v1/models/"
_RELOAD_TIMEOUT_S = 60.0


class Verb(StrEnum):
    START = "start"
    STOP = "stop"
    RESTART = "restart"
    SLEEP = "sleep"
    WAKE = "wake"
    RESET = "reset"


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
        self, method: str, path: str, *, body: Mapping[str, object] | str | None = None, timeout_s: float | None
    ) -> Iterator[Response]:
        """`body`: text is YAML (RFC 9512), a mapping goes as JSON."""
        content = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
        headers = {"Content-Type": f"application/{'yaml' if isinstance(body, str) else 'json'}"} if content else {}
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
