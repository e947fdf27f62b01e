"""mmdctl: the command line. Every command and option is in mmdctl(1) and in the completions; tests compare them.

The commands import their modules when they run: `mmdctl status` need not wait for what only `mmdctl check` uses.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from mmd import __version__
from mmd.ctl.client import Operation, Verb
from mmd.ctl.context import Context
from mmd.ctl.exits import CtlError, Exit
from mmd.ctl.terminal import Terminal
from mmd.errors import MmdError
from mmd.printable import printable
from mmd.scope import Scope

__all__ = ["main", "parser"]

_Run: TypeAlias = Callable[[Context, argparse.Namespace], Exit]
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_SIGPIPE_EXIT = 141
"""128 + SIGPIPE, as shells report a writer whose reader has gone."""
_MODEL = "name, alias, unit id or unit name"
_MODELS = f"{_MODEL}; globs match several"


def main() -> int:
    """The entry point. Returns the exit status (mmdctl(1), EXIT STATUS)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a log line that the locale cannot show must not end mmdctl
    try:
        code = _dispatch(parser(definition="add" in sys.argv).parse_args())
        sys.stdout.flush()
        return code
    except MmdError as error:
        sys.stdout.flush()
        lines = (f"mmdctl: {error.message}", *([f"  {error.hint}"] if error.hint else []))
        print(*map(printable, "\n".join(lines).splitlines()), sep="\n", file=sys.stderr)  # it may hold an engine's last lines
        return error.exit_code if isinstance(error, CtlError) else Exit.FAILED
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it flushes
        return _SIGPIPE_EXIT


def parser(*, definition: bool = True) -> argparse.ArgumentParser:
    """The command line of mmdctl; without `definition`, less the options that define a model, which take 15 ms to make."""
    root = argparse.ArgumentParser(
        prog="mmdctl",
        description="Shows and controls the models that mmd serves.",
        epilog="Manual: man mmdctl. Exit status: 0 done, 1 failed, 2 usage, 3 gateway not reachable, 4 no such model.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"mmdctl {__version__}")
    _add_scope(root, user=False, socket=None)
    commands = root.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_views(commands)
    _add_operations(commands)
    _add_registry(commands, definition=definition)
    _add_configuration(commands)
    _add_units(commands)
    _add_keys(commands)
    return root


def _dispatch(arguments: argparse.Namespace) -> Exit:
    scope = Scope.user() if arguments.user else Scope.system()
    context = Context(scope, arguments.socket or scope.admin_socket, Terminal.of(sys.stdout))
    run: _Run = arguments.run
    return run(context, arguments)


def _add_scope(into: argparse.ArgumentParser, *, user: object, socket: object) -> None:
    into.add_argument("--user", action="store_true", default=user, help="the caller's own instance of mmd")
    into.add_argument("--socket", type=Path, metavar="PATH", default=socket, help="the gateway's admin socket")


def _add(commands: _Commands, name: str, summary: str, run: _Run) -> argparse.ArgumentParser:
    """A command. It takes the scope as well, so that `--user` may stand before or after it."""
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
    _add_scope(command, user=argparse.SUPPRESS, socket=argparse.SUPPRESS)
    command.set_defaults(run=run)
    return command


def _add_json(command: argparse.ArgumentParser, what: str = "JSON, for scripts") -> None:
    command.add_argument("--json", action="store_true", help=what)


def _add_views(commands: _Commands) -> None:
    command = _add(commands, "status", "show the gateway, its GPUs and its models", _status)
    command.add_argument("models", nargs="*", metavar="MODEL", help=f"only these: {_MODELS}")
    _add_json(command)
    command.add_argument("-w", "--watch", action="store_true", help="again every second, until Ctrl-C")

    command = _add(commands, "list", "list the models as configured", _list)
    command.add_argument("models", nargs="*", metavar="MODEL", help=f"only these: {_MODELS}")
    _add_json(command)
    command.add_argument("-q", "--quiet", action="store_true", help="names only")

    command = _add(commands, "show", "show all that is known of one model", _show)
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_json(command)

    command = _add(commands, "requests", "show the requests that are not over", _requests)
    _add_json(command)

    command = _add(commands, "events", "show what has happened of late", _events)
    command.add_argument("-f", "--follow", action="store_true", help="go on with what happens")
    command.add_argument("-n", "--lines", type=_count, metavar="LINES", help="the last so many events")
    _add_json(command, "newline-delimited JSON")

    command = _add(commands, "version", "show the versions of mmdctl and of the gateway that runs", _version)
    _add_json(command)


def _add_operations(commands: _Commands) -> None:
    _add_operation(commands, Verb.START, "start models, or wake them, and wait until they are ready")
    _add_operation(commands, Verb.STOP, "stop models, after their in-flight requests", on_all=True)
    command = _add_operation(commands, Verb.SLEEP, "put models to sleep: their GPU memory becomes free", on_all=True)
    command.add_argument(
        "--level", type=int, choices=(1, 2), help="1: weights to host memory, 2: dropped; default: the model's"
    )
    _add_operation(commands, Verb.WAKE, "wake models, or start them, and wait until they are ready")
    _add_operation(commands, Verb.VERIFY, "try models that are pending, by a start in memory that is free")
    command = _add_operation(commands, Verb.RESTART, "stop and start models")
    _add_force(command)
    _add_operation(commands, Verb.RESET, "forget models' failures, so that they may start again")
    _add_operation(commands, Verb.PIN, "let models make room for no others, from now on")
    _add_operation(commands, Verb.UNPIN, "let models make room for others, from now on")
    command = _add(commands, "cancel", "end requests", _cancel)
    command.add_argument("ids", nargs="+", metavar="ID", help="of a request, as `mmdctl requests` shows it")


def _add_operation(commands: _Commands, verb: Verb, summary: str, *, on_all: bool = False) -> argparse.ArgumentParser:
    command = _add(commands, verb, summary, lambda context, arguments: _operate(context, verb, arguments, command))
    command.add_argument("models", nargs="*" if on_all else "+", metavar="MODEL", help=_MODELS)
    if on_all:
        command.add_argument("--all", action="store_true", help="every model that it makes sense for")
        _add_force(command)
    command.add_argument("--no-wait", action="store_true", help="return as soon as it has begun")
    _add_json(command, "progress as newline-delimited JSON")
    return command


def _add_force(command: argparse.ArgumentParser) -> None:
    command.add_argument("--force", action="store_true", help="do not wait for in-flight requests")


def _add_registry(commands: _Commands, *, definition: bool) -> None:
    command = _add(commands, "add", "add models, and try them, while all others go on serving", _add_models)
    command.add_argument("name", nargs="?", metavar="NAME", help="the name that clients send")
    command.add_argument("--from", dest="source", type=Path, metavar="FILE", help="settings in YAML, - for standard input")
    command.add_argument("--replace", action="store_true", help="in place of a model of that name, added before")
    command.add_argument("--start", action="store_true", help="make room for it and start it")
    command.add_argument("--no-wait", action="store_true", help="return as soon as it is registered, and try nothing")
    command.add_argument("--dry-run", action="store_true", help="check it and print what would be written")
    _add_json(command, "progress as newline-delimited JSON")
    if definition:
        from mmd.ctl.definition import add_options

        add_options(command)

    command = _add(commands, "remove", "remove a model that has a file of its own, after its in-flight requests", _remove_model)
    command.add_argument("model", metavar="MODEL", help=_MODEL)
    _add_force(command)
    command.add_argument("--no-wait", action="store_true", help="return as soon as it is removed from the configuration")
    _add_json(command, "progress as newline-delimited JSON")


def _add_configuration(commands: _Commands) -> None:
    command = _add(commands, "check", "check a configuration; no gateway needed", _check)
    command.add_argument("path", nargs="?", type=Path, metavar="FILE|DIR", help="default: the installed configuration")
    command.add_argument("-q", "--quiet", action="store_true", help="say nothing when it is right")
    _add_json(command)

    command = _add(commands, "config", "print the configuration with profiles and defaults merged in", _config)
    _add_json(command)

    _add(commands, "reload", "check the configuration and bring it into use", _reload)


def _add_units(commands: _Commands) -> None:
    command = _add(commands, "logs", "show logs with journalctl", _logs)
    whose = command.add_mutually_exclusive_group()
    whose.add_argument("model", nargs="?", metavar="MODEL", help=f"{_MODEL}; default: all of mmd")
    whose.add_argument("--gateway", action="store_true", help="the gateway's log alone")
    command.add_argument("-f", "--follow", action="store_true", help="go on with new lines as they come")
    command.add_argument("-n", "--lines", type=_count, metavar="LINES", help="the last so many lines")
    command.add_argument("--since", metavar="TIME", help="from then on: '10 min ago', today (systemd.time(7))")

    command = _add(commands, "cat", "show a model's unit file with its drop-ins", _cat)
    command.add_argument("model", metavar="MODEL", help=_MODEL)


def _add_keys(commands: _Commands) -> None:
    group = commands.add_parser("keys", help="add, list and revoke API keys", allow_abbrev=False)
    group.description = "Adds, lists and revokes API keys. As soon as there is one, clients need one."
    _add_scope(group, user=argparse.SUPPRESS, socket=argparse.SUPPRESS)
    keys = group.add_subparsers(title="commands", metavar="COMMAND", required=True)

    command = _add(keys, "add", "add a key and print it, this once", _keys_add)
    command.add_argument("name", metavar="NAME", help="what it is called in lists and logs")
    command.add_argument(
        "--scope",
        default="use",
        metavar="use|read|admin",
        help="inference, a look at the admin API, or all of both; default: use",
    )
    command.add_argument(
        "--models", nargs="+", action="extend", default=[], metavar="GLOB", help="only models with such a name or alias"
    )
    command.add_argument("--rate", metavar="N/min", help="requests that it may begin per s, min or h")
    command.add_argument("--concurrency", type=int, metavar="N", help="requests that it may have at the same time")
    _add_json(command)

    command = _add(keys, "list", "list the keys and what they may do; not the keys themselves", _keys_list)
    _add_json(command)

    command = _add(keys, "revoke", "revoke a key: whoever has it is refused", _keys_revoke)
    command.add_argument("name", metavar="NAME", help="its name")
    _add_json(command)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of lines")
    return int(text)


def _status(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.status import status

    return status(context, arguments.models, as_json=arguments.json, watch=arguments.watch)


def _list(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.status import list_models

    return list_models(context, arguments.models, as_json=arguments.json, quiet=arguments.quiet)


def _show(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.status import show

    return show(context, arguments.model, as_json=arguments.json)


def _requests(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.requests import requests

    return requests(context, as_json=arguments.json)


def _cancel(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.requests import cancel

    return cancel(context, arguments.ids)


def _events(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.requests import events

    return events(context, follow=arguments.follow, lines=arguments.lines, as_json=arguments.json)


def _version(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.status import version

    return version(context, as_json=arguments.json)


def _operate(context: Context, verb: Verb, arguments: argparse.Namespace, command: argparse.ArgumentParser) -> Exit:
    from mmd.ctl.operate import operate

    options = vars(arguments)  # not every verb has every option
    everything: bool = options.get("all", False)
    if everything == bool(arguments.models):  # both or neither
        command.error("name the models, or give --all")
    operation = Operation(verb, level=options.get("level"), force=options.get("force", False))
    wait = not arguments.no_wait
    return operate(context, operation, arguments.models, everything=everything, wait=wait, as_json=arguments.json)


def _add_models(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.definition import definitions, with_options
    from mmd.ctl.registry import Addition, add, dry_run

    models = definitions(arguments.name, arguments.source, arguments)
    wait, as_json = not arguments.no_wait, arguments.json
    addition = Addition(models, replace=arguments.replace, start=arguments.start, wait=wait, as_json=as_json)
    try:
        return dry_run(context, addition) if arguments.dry_run else add(context, addition)
    except CtlError as error:
        message = with_options(error.message, arguments.name, arguments)
        raise CtlError(message, hint=error.hint, exit_code=error.exit_code) from error


def _remove_model(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.registry import remove

    return remove(context, arguments.model, force=arguments.force, wait=not arguments.no_wait, as_json=arguments.json)


def _check(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.configuration import check

    return check(context, arguments.path, quiet=arguments.quiet, as_json=arguments.json)


def _config(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.configuration import config

    return config(context, as_json=arguments.json)


def _reload(context: Context, _: argparse.Namespace) -> Exit:
    from mmd.ctl.reload import reload

    return reload(context)


def _logs(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.units import logs

    since, lines, follow = arguments.since, arguments.lines, arguments.follow
    return logs(context, arguments.model, gateway=arguments.gateway, follow=follow, lines=lines, since=since)


def _cat(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.units import cat

    cat(context, arguments.model)


def _keys_add(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.keys import Request, add

    request = Request(arguments.name, arguments.scope, arguments.models, arguments.rate, arguments.concurrency)
    return add(context, request, as_json=arguments.json)


def _keys_list(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.keys import list_keys

    return list_keys(context, as_json=arguments.json)


def _keys_revoke(context: Context, arguments: argparse.Namespace) -> Exit:
    from mmd.ctl.keys import revoke

    return revoke(context, arguments.name, as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
