"""What operators have pinned and unpinned at run time, in the state directory: it goes before the configuration, until the next
word about the same model, through restarts and upgrades of the gateway and of the machine."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

__all__ = ["PinBook"]

_log = logging.getLogger(__name__)


class PinBook:
    """A JSON object of booleans by model name. A file that cannot be read or written is said to be so and done without."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def read(self) -> Mapping[str, bool]:
        try:
            found = json.loads(self._file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            _log.warning("what was pinned is not known any more: %s: %s", self._file, error)
            return {}
        pairs = found.items() if isinstance(found, dict) else ()
        return {name: pinned for name, pinned in pairs if isinstance(pinned, bool)}

    def note(self, model: str, *, pinned: bool) -> None:
        pins = {**self.read(), model: pinned}
        fresh = self._file.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(pins, indent=1) + "\n")
            fresh.rename(self._file)
        except OSError as error:
            _log.warning("what is pinned is not kept: %s", error)
