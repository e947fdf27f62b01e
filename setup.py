"""Builds what every request runs through as an extension (mypyc), which takes a fraction of the time that the interpreter does.

pyproject.toml says everything else. The same sources run as they are: in editable installations (an extension beside a source
would hide its changes), where there is no compiler, and with MMD_COMPILE=0. MMD_COMPILE=1 compiles whatever is installed.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Final, cast

from setuptools import Extension, setup

# All calls between these are calls in C; what calls them from outside, and what they call outside, costs what it always does.
COMPILED: Final = (
    "mmd/gateway/relay/client.py",  # reads requests
    "mmd/gateway/relay/known.py",  # looks their heads up
    "mmd/gateway/relay/head.py",  # or has them parsed,
    "mmd/gateway/relay/request_id.py",  # and gives each request its id;
    "mmd/gateway/relay/access.py",  # whose key came with it,
    "mmd/gateway/relay/visitor.py",  # which may do this and that;
    "mmd/gateway/relay/clients.py",  # whose address it came from,
    "mmd/gateway/relay/slowness.py",  # and how slowly;
    "mmd/gateway/relay/framing.py",  # knows where bodies end; every event of a stream is looked at
    "mmd/gateway/relay/exchange.py",  # a request and its answer,
    "mmd/gateway/relay/waiting.py",  # which may have to wait
    "mmd/gateway/relay/room.py",  # for room
    "mmd/gateway/relay/inference.py",  # or for an engine
    "mmd/gateway/relay/cors.py",  # for a browser that asks first,
    "mmd/gateway/relay/refused.py",  # or for nobody
    "mmd/gateway/relay/application.py",  # or for the application: no class of the interpreter's can inherit from a compiled one
    "mmd/gateway/relay/routing.py",  # of the model that is asked for
    "mmd/gateway/relay/document.py",  # in its body
    "mmd/gateway/relay/port_route.py",  # or of the one whose port it is
    "mmd/gateway/relay/engine.py",  # takes an engine's connection, and gives it back
    "mmd/gateway/relay/counters.py",  # counts the tokens of every answer
    "mmd/gateway/relay/gate.py",  # and a place there
    "mmd/gateway/dispatcher.py",  # of the dispatcher, which writes
    "mmd/gateway/ticket.py",  # a ticket for every request
    "mmd/gateway/workers/tenant.py",  # or, in a worker, its lease
    "mmd/gateway/workers/tally.py",  # and what is counted by it
    "mmd/policy/scheduler.py",  # lets it in
    "mmd/policy/admission.py",  # at once
    "mmd/policy/traffic.py",  # and takes note of it,
    "mmd/policy/state.py",  # by what these
    "mmd/policy/instance.py",  # hold
)

# What a wheel is built by, and what changes a checkout.
_COMMANDS: Final = {"bdist_wheel", "build", "build_ext"}
_EDITABLE: Final = {"develop", "editable_wheel"}


def extensions() -> list[Extension]:
    """The extensions to build; none, with a word about why, where the sources are to run as they are."""
    wanted = os.environ.get("MMD_COMPILE", "")
    commands = set(sys.argv)
    if not commands & (_COMMANDS | _EDITABLE):
        return []  # setuptools asks for names and versions only
    if wanted == "0" or (wanted != "1" and commands & _EDITABLE):
        return _without("MMD_COMPILE=0" if wanted == "0" else "an editable installation")
    missing = _missing()
    if missing and wanted == "1":
        sys.exit(f"mmd: MMD_COMPILE=1, and there is no {missing}")
    if missing:
        return _without(f"there is no {missing}")
    from mypyc.build import mypycify

    # Neither a configuration nor site-packages: what is built does not depend on what else is installed, and the types are
    # checked by tests/lint. (Without msgspec at hand, the arguments of its classes look like mistakes.) -O1 takes half the time
    # of -O2, and no request is slower for it.
    options = ["--config-file=", "--no-site-packages", "--ignore-missing-imports", "--disable-error-code=call-arg", *COMPILED]
    found = cast("list[Extension]", mypycify(options, opt_level="1", debug_level="0", group_name="mmd"))
    for extension in found:
        # What a newer compiler warns of is nobody's problem here.
        extension.extra_compile_args = [word for word in extension.extra_compile_args if word != "-Werror"]
    return found


def _missing() -> str:
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        return f"C compiler ({compiler})"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{header} (package python3-dev)"


def _without(reason: str) -> list[Extension]:
    print(f"mmd: the relay is not compiled: {reason}", file=sys.stderr)
    return []


setup(ext_modules=extensions())
