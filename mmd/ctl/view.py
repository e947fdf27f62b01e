"""The gateway's status as a person reads it: pure functions from Status to lines."""

import shlex
from collections.abc import Iterator, Sequence

from mmd.ctl import reckoning
from mmd.ctl.context import Context
from mmd.ctl.table import Cell, Column, table
from mmd.ctl.terminal import Colour, Terminal, printable
from mmd.ctl.words import duration, gib, moment
from mmd.quantity import human_size, size_on_gpus
from mmd.status import GatewayStatus, GpuStatus, InstanceStatus, ModelState, ModelStatus, ResourceStatus, Status

__all__ = ["catalogue", "details", "overview"]

_COLOURS = {
    ModelState.READY: Colour.GREEN,
    ModelState.EXTERNAL: Colour.GREEN,
    ModelState.SLEEPING: Colour.BLUE,
    ModelState.STARTING: Colour.YELLOW,
    ModelState.WAKING: Colour.YELLOW,
    ModelState.DRAINING: Colour.YELLOW,
    ModelState.STOPPING: Colour.YELLOW,
    ModelState.FAILED: Colour.RED,
    ModelState.STOPPED: Colour.DIM,
    ModelState.PENDING: Colour.CYAN,
}
_STATUS_COLUMNS = (
    Column("MODEL", elastic=True),
    Column("STATE"),
    Column("PLACEMENT", drop=4),
    Column("VRAM", right=True),
    Column("IN-FLIGHT", right=True, drop=5),
    Column("WAITING", right=True, drop=3),
    Column("IDLE", right=True, drop=6),
    Column("SINCE", right=True, drop=2),
    Column("", elastic=True, drop=1),
)
_CATALOGUE_COLUMNS = (
    Column("MODEL", elastic=True),
    Column("ID", drop=4),
    Column("ENGINE"),
    Column("GPUS", right=True, drop=3),
    Column("VRAM", right=True),
    Column("PORT", drop=5),
    Column("ALIASES", elastic=True, drop=2),
    Column("DESCRIPTION", elastic=True, drop=1),
)
_NONE = "-"
_BAR_WIDTH = 20
_FULL = 0.95
"""What is used above this share is shown in yellow."""
_TAIL_LINES = 5
"""Log lines of a failed model in the overview; `show` has them all."""


def overview(context: Context, status: Status, now_s: float) -> list[str]:
    """What `mmdctl status` shows: the gateway, the GPUs and other resources, the models, and what is wrong."""
    terminal = context.terminal
    lines = [*_gateway(status.gateway, now_s), *_budgets(status, terminal), ""]
    rows = [row for model in status.models for row in _rows(model, now_s)]
    lines += table(_STATUS_COLUMNS, rows, terminal) if rows else ["no models: add one to the configuration, mmd.yaml(5)"]
    problems = list(_problems(context, status))
    if problems:
        lines += ["", terminal.paint("Problems", Colour.BOLD), *problems]
    if status.gateway.warnings:
        warnings = (f"  configuration: {printable(warning)}" for warning in status.gateway.warnings)
        lines += ["", terminal.paint("Warnings", Colour.BOLD), *warnings]
    return lines


def catalogue(models: Sequence[ModelStatus], terminal: Terminal) -> list[str]:
    """What `mmdctl list` shows: the models as configured."""
    rows = [
        [
            Cell(model.name),
            Cell(model.id),
            Cell(model.engine),
            Cell(str(model.gpus)),
            Cell(human_size(model.vram_bytes) if model.gpus else _NONE),
            Cell(model.port or _NONE),
            Cell(", ".join(model.aliases)),
            Cell(printable(model.description)),
        ]
        for model in models
    ]
    return table(_CATALOGUE_COLUMNS, rows, terminal)


def details(model: ModelStatus, terminal: Terminal, now_s: float) -> list[str]:
    """What `mmdctl show` shows: all there is to know of one model."""
    facts = [
        ("Model", model.name),
        ("Aliases", ", ".join(model.aliases)),
        ("Description", printable(model.description)),
        ("Link", printable(model.url)),
        ("State", terminal.paint(_state(model.state, 0), _COLOURS[model.state])),
        ("Reason", printable(model.reason)),
        ("Engine", model.engine),
        ("Unit id", model.id),
        ("Port", f"{model.port} ({model.port_protocol})" if model.port else ""),
        ("VRAM", f"{size_on_gpus(_awake_bytes(model), model.gpus)} while awake" if model.gpus else "none"),
        *(reckoning.facts(model.reckoning) if model.reckoning else ()),
        ("Pinned", "yes, never evicted" if model.pinned else ""),
        ("Requests", f"{model.requests} served, {model.in_flight} in flight, {model.waiting} waiting"),
        ("Last request", f"{duration(now_s - model.last_activity)} ago" if model.last_activity else ""),
    ]
    lines = [f"{name:>12}: {value}" for name, value in facts if value]
    for instance in model.instances:
        lines += ["", *_instance(instance, terminal, now_s)]
    if model.tail:
        lines += ["", "Last lines of its log:", *(f"  {printable(line)}" for line in model.tail)]
    return lines


def _gateway(gateway: GatewayStatus, now_s: float) -> list[str]:
    traffic = f"{gateway.in_flight} in flight, {gateway.waiting} waiting"
    workers = f", {gateway.workers} workers" if gateway.workers > 1 else ""
    lines = [f"mmd {gateway.version}, up {duration(now_s - gateway.since)}, pid {gateway.pid}{workers}; {traffic}"]
    if gateway.listen:
        lines.append(f"listening on {', '.join(gateway.listen)}")
    return lines


def _budgets(status: Status, terminal: Terminal) -> list[str]:
    columns = (
        Column("", elastic=True),
        Column("", elastic=True, drop=3),
        Column("", drop=2),
        Column("", right=True),
        Column("", drop=1),
    )
    rows = [_gpu(gpu, terminal) for gpu in status.gpus] + [_resource(resource, terminal) for resource in status.resources]
    return table(columns, rows, terminal)[1:]


def _gpu(gpu: GpuStatus, terminal: Terminal) -> list[Cell]:
    return [
        Cell(f"GPU {gpu.index}"),
        Cell(printable(gpu.name)),
        _bar(_used(gpu), gpu.total_bytes, terminal),
        Cell(f"{gib(_used(gpu))} / {gib(gpu.total_bytes)} GiB"),
        Cell(f"models {gib(gpu.reserved_bytes)} of {gib(gpu.budget_bytes)} GiB", Colour.DIM),
    ]


def _resource(resource: ResourceStatus, terminal: Terminal) -> list[Cell]:
    """What models have of a named resource, and what is free for more."""
    words, unit = (gib, " GiB") if resource.in_bytes else ("{:.10g}".format, "")
    begin = (Cell(resource.name), Cell(""))
    if resource.budget is None or resource.free is None:
        return [*begin, Cell(""), Cell(f"{words(resource.reserved)}{unit}"), Cell("not known what is free", Colour.DIM)]
    return [
        *begin,
        _bar(resource.reserved, resource.budget, terminal),
        Cell(f"{words(resource.reserved)} / {words(resource.budget)}{unit}"),
        Cell(f"{words(max(0, resource.free))}{unit} free", Colour.DIM),
    ]


def _used(gpu: GpuStatus) -> int:
    return gpu.reserved_bytes if gpu.used_bytes is None else gpu.used_bytes


def _bar(used: float, total: float, terminal: Terminal) -> Cell:
    share = min(used / total, 1.0) if total > 0 else float(used > 0)
    full, empty = ("█", "░") if terminal.unicode else ("#", ".")
    filled = round(share * _BAR_WIDTH)
    return Cell(full * filled + empty * (_BAR_WIDTH - filled), Colour.YELLOW if share > _FULL else Colour.CYAN)


def _rows(model: ModelStatus, now_s: float) -> Iterator[list[Cell]]:
    """One row per instance, or one for a model that has none."""
    if not model.instances:
        state = Cell(_state(model.state, 0), _COLOURS[model.state])
        traffic = [Cell(str(model.in_flight)), Cell(str(model.waiting))]
        yield [Cell(model.name), state, Cell(_NONE), Cell(_NONE), *traffic, Cell(_NONE), Cell(_NONE), Cell("")]
    for position, instance in enumerate(model.instances):
        yield [
            Cell(model.name),
            Cell(_state(instance.state, instance.sleep_level), _COLOURS[instance.state]),
            Cell(instance.placement),
            Cell(size_on_gpus(instance.vram_bytes, _gpu_count(instance)) if instance.vram_bytes else _NONE),
            Cell(str(instance.in_flight)),
            Cell(str(model.waiting) if position == 0 else ""),
            Cell(_idle(model, instance, now_s)),
            Cell(moment(instance.since, now_s)),
            Cell(_note(instance), Colour.DIM),
        ]


def _state(state: ModelState, sleep_level: int) -> str:
    return f"{state} ({sleep_level})" if state is ModelState.SLEEPING and sleep_level else str(state)


def _gpu_count(instance: InstanceStatus) -> int:
    return instance.placement.count("-") + 1


def _awake_bytes(model: ModelStatus) -> int:
    return model.reckoning.vram_bytes if model.reckoning else model.vram_bytes


def _idle(model: ModelStatus, instance: InstanceStatus, now_s: float) -> str:
    """How long it has been ready or asleep without a request."""
    if instance.state not in (ModelState.READY, ModelState.SLEEPING) or instance.in_flight:
        return _NONE
    if model.last_activity is None:
        return duration(now_s - instance.since)
    if instance.state is ModelState.SLEEPING:
        return duration(now_s - model.last_activity)
    return duration(now_s - max(instance.since, model.last_activity))


def _note(instance: InstanceStatus) -> str:
    busy = instance.state not in (ModelState.READY, ModelState.SLEEPING, ModelState.STOPPED, ModelState.FAILED)
    notes = (printable(instance.status) if busy else "", "older definition, replaced when idle" if instance.stale else "")
    return "; ".join(note for note in notes if note)


def _instance(instance: InstanceStatus, terminal: Terminal, now_s: float) -> list[str]:
    facts = [
        ("Unit", instance.unit),
        ("State", terminal.paint(_state(instance.state, instance.sleep_level), _COLOURS[instance.state])),
        ("Since", f"{moment(instance.since, now_s)}, {duration(now_s - instance.since)} ago"),
        ("Status", printable(instance.status)),
        ("Placement", instance.placement if instance.placement == "cpu" else f"GPU {instance.placement}"),
        ("VRAM", size_on_gpus(instance.vram_bytes, _gpu_count(instance)) if instance.vram_bytes else ""),
        ("In flight", str(instance.in_flight)),
        ("PID", str(instance.pid) if instance.pid else ""),
        ("Definition", "older than the configuration, replaced when idle" if instance.stale else ""),
    ]
    return [f"{name:>12}: {value}" for name, value in facts if value]


def _problems(context: Context, status: Status) -> Iterator[str]:
    """Each problem, and beneath it what to type."""
    if status.gateway.systemd != "connected":
        yield f"  systemd: {printable(status.gateway.systemd)}"
        yield f"    {shlex.join((*context.systemctl, 'status', 'dbus.service'))}"
    if status.gateway.gpu_problem:
        yield f"  GPUs: they cannot be read: {printable(status.gateway.gpu_problem)}"
        known = "what was last known of them counts" if status.gpus else "models that need one cannot start"
        yield f"    until they can, {known}"
    for resource in status.resources:
        if resource.problem:
            yield f"  resource {resource.name}: {printable(resource.problem)}"
    for problem in status.gateway.problems:
        yield f"  configuration: {printable(problem)}"
    if status.gateway.problems:
        yield f"    the last good one is in use; correct it, then: {context.command('reload')}"
    for model in status.models:
        if model.state is ModelState.FAILED:
            failed = context.terminal.paint(f"{model.name} failed", Colour.RED)
            yield f"  {failed}: {printable(model.reason) or 'no reason known'}"
            yield from (f"    | {printable(line)}" for line in model.tail[-_TAIL_LINES:])
            yield f"    {context.command('logs', model.name)}"
            yield f"    {context.command('reset', model.name)}   (once it is put right)"
        elif model.reason:
            yield f"  {model.name}: {printable(model.reason)}"
            yield f"    {context.command('show', model.name)}"
