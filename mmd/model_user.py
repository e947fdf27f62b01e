"""mmd-user@.service: the system user that the engines of one model run as, made where there is none (systemd-sysusers(8)).

It is root and is given a name by whoever starts the unit, so it takes only names that `mmd.names.model_user` makes. Users stay
when a model goes: files of theirs do, and a later model must not inherit them by their number.
"""

import pwd
import subprocess
import sys
from collections.abc import Sequence

from mmd.names import MODEL_UIDS, is_model_user

__all__ = ["main"]

_EX_USAGE = 64  # sysexits.h


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the user that the only argument names."""
    words = sys.argv[1:] if argv is None else list(argv)
    if len(words) != 1 or not is_model_user(words[0]):
        print(f"not the name of a model's user: {' '.join(words)!r}", file=sys.stderr)
        return _EX_USAGE
    name = words[0]
    if _exists(name):
        return 0
    lines = (f"r - {MODEL_UIDS[0]}-{MODEL_UIDS[1]}", f'u {name} - "mmd model" /nonexistent')
    done = subprocess.run(["systemd-sysusers", "--inline", *lines], check=False, stdin=subprocess.DEVNULL)
    if _exists(name):
        return 0
    print(
        f"the user {name} could not be made (systemd-sysusers: exit status {done.returncode}): /etc must be writable, and a "
        f"uid of {MODEL_UIDS[0]} to {MODEL_UIDS[1]} free. Or name a user that exists: `user:` of the model, in mmd.yaml",
        file=sys.stderr,
    )
    return done.returncode or 1


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
