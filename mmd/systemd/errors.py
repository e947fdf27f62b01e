"""What can go wrong between mmd and systemd. D-Bus error names: org.freedesktop.systemd1(5), sd-bus-errors(3)."""

from mmd.errors import MmdError

__all__ = [
    "NO_REPLY",
    "SystemdAccessDeniedError",
    "SystemdDisconnectedError",
    "SystemdError",
    "SystemdMaskedError",
    "SystemdNoSuchUnitError",
    "SystemdTimeoutError",
    "systemd_error",
]


class SystemdError(MmdError):
    """systemd refused a call; `name` is the D-Bus error name, such as `org.freedesktop.DBus.Error.InvalidArgs`."""

    hint_template = ""
    """The hint of this kind of error; `{unit}` stands for the unit of the call."""

    def __init__(self, message: str, *, name: str = "", unit: str = "") -> None:
        super().__init__(message, hint=self.hint_template.format(unit=unit or "UNIT"))
        self.name = name
        self.unit = unit


class SystemdAccessDeniedError(SystemdError):
    """The unit broker does not do that: the unit is not one that mmd-generator made."""

    hint_template = "systemctl cat {unit}; drop-ins of your own are fine (systemctl edit), a template in another folder is not"


class SystemdNoSuchUnitError(SystemdError):
    """There is no unit file for it: the generator has not made one."""

    hint_template = "mmdctl reload; journalctl -t mmd-generator"


class SystemdMaskedError(SystemdError):
    """The administrator has masked the unit."""

    hint_template = "systemctl unmask {unit}"


class SystemdTimeoutError(SystemdError):
    """No answer in time. The call may still be carried out: read the unit's state, never just repeat the call."""

    hint_template = "systemctl list-jobs; systemctl status {unit}"


class SystemdDisconnectedError(SystemdError):
    """There is no D-Bus connection, or it broke during the call, which may have been carried out: read the unit's state."""

    hint_template = "systemctl status dbus.service"


NO_REPLY = "org.freedesktop.DBus.Error.NoReply"
"""systemd left the bus before it answered: it re-executed itself."""

_KINDS: dict[str, type[SystemdError]] = {
    "org.freedesktop.DBus.Error.AccessDenied": SystemdAccessDeniedError,
    "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired": SystemdAccessDeniedError,
    "org.freedesktop.systemd1.NoSuchUnit": SystemdNoSuchUnitError,
    "org.freedesktop.systemd1.UnitMasked": SystemdMaskedError,
    "org.freedesktop.DBus.Error.Timeout": SystemdTimeoutError,
    "org.freedesktop.DBus.Error.TimedOut": SystemdTimeoutError,
    NO_REPLY: SystemdTimeoutError,
    "org.freedesktop.DBus.Error.Disconnected": SystemdDisconnectedError,
    "System.Error.ENOTCONN": SystemdDisconnectedError,
    "System.Error.EPIPE": SystemdDisconnectedError,
}


def systemd_error(name: str, message: str, *, unit: str = "") -> SystemdError:
    """The exception for a D-Bus error."""
    return _KINDS.get(name, SystemdError)(message or name, name=name, unit=unit)
