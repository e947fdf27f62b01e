"""Names: what clients call a model, what systemd calls its units, and which devices an instance sits on.

A model's name is whatever clients send (`Qwen/Qwen2.5-7B-Instruct`). Its unit id is a slug of that name. A unit instance is a
placement: `mmd-model-qwen7b@0-1.service` is the model `qwen7b` on GPUs 0 and 1, `@cpu` is a model that needs no GPU.

A slice of a divided GPU (MIG) counts as a GPU, with an index that no whole one has: 100 is slice 0 of GPU 0, 201 is slice 1 of
GPU 1.
"""

import re
from _blake2 import blake2b  # hashlib would load OpenSSL: 5 ms of the generator's 60
from typing import NamedTuple

from mmd.errors import MmdError

__all__ = [
    "CPU",
    "MODEL_UIDS",
    "MODEL_UNIT_PATTERN",
    "Placement",
    "UnitName",
    "divided_gpu",
    "is_model_unit",
    "is_model_user",
    "is_slice",
    "is_unit_id",
    "model_user",
    "slice_index",
    "slug",
]

_ID = r"[a-z0-9][a-z0-9._-]{0,62}"
_GPUS = r"[0-9]{1,6}(?:-[0-9]{1,6})*"
_UNIT = rf"mmd-model-(?P<id>{_ID})@(?P<instance>cpu|{_GPUS})\.service"
_CPU_INSTANCE = "cpu"
_UNIT_NAME_MAX = 255  # systemd.unit(5)

# More GPUs than a machine has, and more slices than a GPU: 64 and 8 at present.
_SLICES = 100

MODEL_UNIT_PATTERN = "mmd-model-*@*.service"
"""Glob for ListUnitsByPatterns (org.freedesktop.systemd1(5)) that finds every model unit."""


MODEL_UIDS = (60578, 60879)
"""The first and the last uid of the users of models. systemd leaves 60578 to 61183 to nobody (systemd.io/UIDS-GIDS); half of it
is enough for 302 models, and above the uids that useradd(8) gives to people (UID_MAX, 60000)."""

# A name of a user has 31 characters at most: utmp's limit, which systemd and shadow keep to.
_USER_PREFIX = "mmd-m-"
_PLAIN_ID = r"[a-z0-9][a-z0-9-]{0,21}"
# So that a hash has 64 bits: of fewer a member of mmd-admin could find an id with the same user as another model's.
_READABLE = 6
_LONG = 23  # one more than _PLAIN_ID has at most, so that no short id spells the user of a long one


class Placement(NamedTuple("Placement", [("gpus", tuple[int, ...])])):
    """The GPUs that one instance of a model occupies, by index, ascending; empty means CPU only."""

    __slots__ = ()

    def __new__(cls, gpus: tuple[int, ...] = ()) -> "Placement":
        if list(gpus) != sorted(set(gpus)) or any(gpu < 0 for gpu in gpus):
            raise MmdError(f"a placement is a set of GPU indexes in ascending order, not {gpus}")
        return super().__new__(cls, gpus)

    def __str__(self) -> str:
        """The instance name: `0`, `0-1`, `cpu`."""
        return "-".join(map(str, self.gpus)) if self.gpus else _CPU_INSTANCE

    @classmethod
    def parse(cls, instance: str) -> "Placement":
        """The placement that an instance name stands for; MmdError when it is none."""
        if instance == _CPU_INSTANCE:
            return CPU
        if not re.fullmatch(_GPUS, instance):
            raise MmdError(f"{instance!r} is not a placement", hint="GPU indexes joined by '-', such as 0 or 0-1, or cpu")
        return cls(tuple(int(part) for part in instance.split("-")))


CPU = Placement()


class UnitName(NamedTuple):
    """A model unit: the model's unit id and its placement."""

    id: str
    placement: Placement

    def __str__(self) -> str:
        return f"mmd-model-{self.id}@{self.placement}.service"

    @classmethod
    def parse(cls, unit: str) -> "UnitName | None":
        """The model unit that `unit` names, or None when it is no model unit of ours."""
        match = re.fullmatch(_UNIT, unit)
        if match is None:
            return None
        try:
            return cls(match["id"], Placement.parse(match["instance"]))
        except MmdError:  # indexes out of order: started by hand, not one of ours
            return None


def is_model_unit(unit: str) -> bool:
    """Whether `unit` is exactly the name that a model unit of ours has: one spelling for each placement."""
    if len(unit) > _UNIT_NAME_MAX:
        return False
    name = UnitName.parse(unit)
    return name is not None and str(name) == unit


def slice_index(gpu: int, number: int) -> int:
    """The index of slice `number` of the divided GPU `gpu`."""
    return _SLICES * (gpu + 1) + number


def is_slice(index: int) -> bool:
    """Whether an index is that of a slice, not of a whole GPU."""
    return index >= _SLICES


def divided_gpu(index: int) -> tuple[int, int]:
    """The inverse of `slice_index`: the GPU, and the slice's number on it."""
    gpu, number = divmod(index, _SLICES)
    return gpu - 1, number


def is_unit_id(text: str) -> bool:
    """Whether `text` may be a unit id: `[a-z0-9][a-z0-9._-]{0,62}`."""
    return re.fullmatch(_ID, text) is not None


def model_user(unit_id: str, *, private: bool = False) -> str:
    """The system user that the engines of a model run as, of 29 characters at most: `mmd-m-` and the unit id.

    An id that is long, or has a `.` or `_`, which names of users do without, is shortened, and told from others by a hash. With
    `private` it is always a hash, of what no id can be: a model whose definition holds what is root's must not follow one of
    the same id that a member of mmd-admin had added.
    """
    if not private and re.fullmatch(_PLAIN_ID, unit_id):
        return _USER_PREFIX + unit_id
    readable = re.sub(r"[._]", "-", unit_id)[:_READABLE]
    digest = blake2b((f"private/{unit_id}" if private else unit_id).encode(), digest_size=16).hexdigest()
    return _USER_PREFIX + f"{readable}-{digest}"[:_LONG]


def is_model_user(name: str) -> bool:
    """Whether `name` is one that `model_user` makes."""
    return re.fullmatch(rf"{_USER_PREFIX}(?:{_PLAIN_ID}|[a-z0-9][a-z0-9-]{{{_LONG - 1}}})", name) is not None


def slug(name: str) -> str:
    """The unit id that a model name gets when it declares none; MmdError when nothing usable is left of it."""
    text = re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._")[:63].rstrip("-._")
    if not is_unit_id(text):
        raise MmdError(f"no unit id can be made of the model name {name!r}", hint="give the model an `id:`")
    return text
