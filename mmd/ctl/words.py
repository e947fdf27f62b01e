"""Durations and moments in words, for the columns of tables. What the gateway says is in mmd.quantity's words."""

import time

__all__ = ["duration", "gib", "moment"]

_SPANS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def gib(size_bytes: float) -> str:
    """The number of GiB alone, one decimal: for columns and pairs that share the unit."""
    return f"{size_bytes / (1 << 30):.1f}"


def duration(duration_s: float) -> str:
    """The two largest units that matter: `42 s`, `12 min`, `3 h 12 min`, `2 d 3 h`. Below 10 s with a decimal."""
    if duration_s < 9.95:
        return f"{max(duration_s, 0.0):.1f} s"
    rest = round(duration_s)
    for position, (unit, factor) in enumerate(_SPANS):
        if rest < factor:
            continue
        count, rest = divmod(rest, factor)
        if unit in ("min", "s"):
            return f"{count} {unit}"
        below, below_factor = _SPANS[position + 1]
        return f"{count} {unit} {rest // below_factor} {below}" if rest >= below_factor else f"{count} {unit}"
    return "0 s"


def moment(time_s: float, now_s: float) -> str:
    """A Unix time as the local clock shows it: `14:02:11` today, else `Nov 20 14:02`."""
    then, now = time.localtime(time_s), time.localtime(now_s)
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%b %d %H:%M", then)
