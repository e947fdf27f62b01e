"""The kinds of value that become an engine's environment. Errors are read by many, so they do not show what may be secret."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmd.kinds import VARIABLE_NAME, WORD, BadValueError, Kind, exactly, mapping
from mmd.secrecy import looks_secret

__all__ = ["ENVIRONMENT", "SECRETS"]


def _variables(names: Kind, item: Kind, hides: Callable[[str], bool]) -> Kind:
    """A mapping of variables; errors do not show values of the names that `hides` says."""
    shown = mapping(names, item)

    def read(value: Any) -> dict[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):  # such as HF_TOKEN=hf_abc
            raise BadValueError(f"must be {shown.noun}", "write {NAME: value}")
        variables: dict[str, Any] = {}
        for name, part in value.items():
            variables |= _hidden(name, part) if hides(str(name)) else shown.read({name: part})
        return variables

    def _hidden(name: str, part: Any) -> dict[str, Any]:
        try:
            names.read(name)
        except BadValueError:
            known = str(name).partition("=")[0]  # {HF_TOKEN=hf_abc} is a key
            raise BadValueError(f"is not {names.noun}", "write {NAME: value}", (known,)) from None
        try:
            return {name: item.read(part)}
        except BadValueError as error:
            raise BadValueError(f"must be {item.noun}", error.hint, (name,)) from None

    return shown._replace(read=read)


def _strict(noun: str, pattern: str, hint: str, make: Callable[[str], Any]) -> Kind:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or re.fullmatch(pattern, value) is None:
            raise BadValueError(f"must be {noun}", hint)
        return make(value)

    return Kind(noun, {"type": "string", "pattern": exactly(pattern)}, read, str)


# A variable is a credential of its name, which is a file's name.
_CREDENTIAL_NAME = _strict("a name of an environment variable", r"[A-Za-z_][A-Za-z0-9_]{0,254}", "", str)

# Normalised; without what separates the parts of LoadCredential= or continues a line. systemd strips blanks at its end.
_NOT_IN_FILES = r"/:\\\x00-\x1f\x7f-\x9f\u2028\u2029\ufdd0-\ufdef\ufffe\uffff\ud800-\udfff"
_SECRET_FILE = _strict(
    "the absolute path of a file that holds the value",
    rf"(?:/(?!\.\.?(?:/|(?![\s\S])))(?:[^{_NOT_IN_FILES}]*[^ {_NOT_IN_FILES}]))+",
    "such as /etc/mmd/secrets/hf-token; without : or \\",
    Path,
)

ENVIRONMENT = _variables(VARIABLE_NAME, WORD, looks_secret)
SECRETS = _variables(_CREDENTIAL_NAME, _SECRET_FILE, lambda _: True)
