"""What a schema cannot say of a configuration: rules between keys, between models, and between a model and its machine."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mmd.addresses import parse_address
from mmd.check import Complaint
from mmd.config import AdminAuth, Device, EngineKind, Gateway, Gauge, Gpus, Listen, Model, PortProtocol, Provider, Resources
from mmd.model_settings import MODEL
from mmd.names import Placement, UnitName, slice_index
from mmd.scope import OWN_SOCKETS, Scope
from mmd.setting import Later, Section
from mmd.similar import nearest

__all__ = [
    "ENGINE_SOCKET",
    "NamesTaken",
    "applicable",
    "check_gateway",
    "check_gpus",
    "check_model",
    "check_resources",
    "misplaced",
]

ENGINE_SOCKET = "engine.sock"

_SOCKET_PATH_MAX_BYTES = 107  # sun_path is 108 bytes with its NUL, unix(7)

# Less does not hold what browsers send by themselves, and nobody means more.
_HEAD_MIN_BYTES = 4 << 10
_HEAD_MAX_BYTES = 1 << 20

# A program ten times a second is as much as a gauge may cost; what is an hour old says nothing of what is free.
_INTERVAL_MIN_S = 0.1
_INTERVAL_MAX_S = 3600.0


def applicable(values: Mapping[str, Any], engine: EngineKind, section: Section = MODEL) -> dict[str, Any]:
    """Of the values in `defaults` those that apply to `engine`."""
    kept: dict[str, Any] = {}
    for key, value in values.items():
        entry = section.entries[key]
        if not isinstance(entry, Later) and engine in entry.engines:
            kept[key] = applicable(value, engine, entry) if isinstance(entry, Section) else value
    return kept


def misplaced(
    values: Mapping[str, Any], engine: EngineKind, section: Section = MODEL, path: tuple[str, ...] = ()
) -> Iterator[Complaint]:
    """Keys of a model, or of its profile, that its engine does not know."""
    for key, value in values.items():
        entry = section.entries[key]
        if isinstance(entry, Later):
            continue
        if engine not in entry.engines:
            engines = " or ".join(sorted(entry.engines))
            yield (*path, key), f"does not apply to engine {engine}", f"only to {engines}"
        elif isinstance(entry, Section):
            yield from misplaced(value, engine, entry, (*path, key))


def check_model(model: Model, *, scope: Scope, resources: Resources) -> Iterator[Complaint]:
    """What is wrong with one model; paths start below the model."""
    if model.engine is EngineKind.COMMAND and not model.command:
        yield ("command",), "needed by engine command", 'such as ["/opt/server", "--port", "{port}"]'
    if model.engine is EngineKind.EXTERNAL and model.endpoint is None:
        yield ("endpoint",), "needed by engine external", "such as http://127.0.0.1:9000"
    if model.gpu_count and model.vram_bytes is None and model.params is None:
        yield ("vram",), "needed by a model that uses a GPU", "write its vram, or its params for an estimate; or gpus: 0"
    if isinstance(model.gpus, tuple) and len(set(model.gpus)) < len(model.gpus):
        yield ("gpus",), "names a GPU twice", ""
    yield from _check_replicas(model)
    yield from _check_port(model, scope)
    for name in model.secrets:
        if name in model.env:
            yield ("secrets", name), "is in env too", "remove it there"
    for name in model.resources:
        if name not in resources.names:
            match = nearest(name, resources.names)
            hint = f"did you mean {match}?" if match else f"declare it: resources: {{{name}: AMOUNT}}"
            yield ("resources", name), "no such resource", hint
    on_socket = model.engine in (EngineKind.VLLM, EngineKind.SIM) or model.listen is Listen.UNIX
    if on_socket and model.engine is not EngineKind.EXTERNAL:
        socket = f"{scope.unit_dir(UnitName(model.id, _longest_placement(model)))}/{ENGINE_SOCKET}"
        excess = len(os.fsencode(socket)) - _SOCKET_PATH_MAX_BYTES
        if excess > 0:
            yield ("id",), f"its socket's path {socket} is {excess} bytes too long", "give the model a shorter id"


def _check_replicas(model: Model) -> Iterator[Complaint]:
    if model.replicas.min > model.replicas.max:
        yield ("replicas", "min"), f"is more than replicas.max, {model.replicas.max}", "raise max"
    if model.replicas.max == 1:
        return
    if model.gpu_count == 0 or isinstance(model.gpus, tuple):
        yield ("replicas", "max"), "needs `gpus` to be a count above 0: each replica has GPUs of its own", "such as gpus: 1"
    if model.listen_port is not None:
        yield ("listen",), "replicas cannot share a port", "write tcp: a free port is chosen for each"


def _check_port(model: Model, scope: Scope) -> Iterator[Complaint]:
    if model.port is None:
        if model.port_protocol is not PortProtocol.HTTP:
            yield ("port_protocol",), "needs a port", 'such as port: "127.0.0.1:8081"'
    elif not _is_address(model.port):
        yield ("port",), f"{model.port} is not an IPv6 address and a port", "write [::1]:8081"
    elif model.port.startswith("/") and len(model.port.encode()) > _SOCKET_PATH_MAX_BYTES:
        yield ("port",), f"a socket's path has at most {_SOCKET_PATH_MAX_BYTES} bytes", ""
    elif model.port.startswith("/") and not _is_directly_in(scope.port_dir, model.port):
        yield ("port",), f"{model.port} is not in {scope.port_dir}", f"write {scope.port_dir}/{model.id}.sock"
    if model.port_protocol is PortProtocol.TCP and (model.endpoint or "").startswith("https:"):
        yield ("port_protocol",), "tcp does not reach an endpoint that speaks TLS", "write http"


def _longest_placement(model: Model) -> Placement:
    """The placement with the longest name that it is likely to get: the index of a slice is longer than a whole GPU's."""
    return Placement((slice_index(0, 0),) if model.gpu_count == 1 else tuple(range(model.gpu_count)))


class NamesTaken:
    """Names and ids that models have so far: a second claim is a complaint that names the first."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """`names`: every model's name and where it is defined."""
        self._names = names
        self._aliases: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def check(self, model: Model) -> Iterator[Complaint]:
        if model.id in self._ids:
            first = self._ids[model.id]
            yield ("id",), f"{model.id} is already the unit id of {first}", "give one of the two an id of its own"
        seen: set[str] = set()
        for index, alias in enumerate(model.aliases):
            where = ("aliases", index)
            if alias in self._names:
                yield where, f"{alias!r} is the name of the model at {self._names[alias]}", "choose another alias"
            elif alias in self._aliases:
                yield where, f"{alias!r} is already an alias of {self._aliases[alias]}", "choose another alias"
            elif alias in seen:
                yield where, f"{alias!r} is given twice", "remove one"
            seen.add(alias)
        for adapter in model.lora:
            if adapter in self._names or adapter in self._aliases or adapter in seen:
                yield ("lora", adapter), f"{adapter!r} is the name of another model already", "choose another name"

    def add(self, model: Model) -> None:
        self._ids[model.id] = model.name
        self._aliases.update((name, model.name) for name in (*model.aliases, *model.lora))


def _is_directly_in(folder: Path, path: str) -> bool:
    """Whether `path` is a plain name in `folder`, written in its one way."""
    above, _, name = path.rpartition("/")
    return above == str(folder) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) is not None


def check_gateway(gateway: Gateway, complaints: list[Complaint], *, scope: Scope) -> Gateway:
    """The gateway without the addresses that cannot be listened on."""
    seen: set[str] = set()
    kept: dict[str, list[str]] = {"listen": [], "admin_listen": []}
    for key, addresses in (("listen", gateway.listen), ("admin_listen", gateway.admin_listen)):
        for index, address in enumerate(addresses):
            if address in seen:
                complaints.append(((key, index), f"{address} is given twice", "remove one"))
            elif not _is_address(address):
                complaints.append(((key, index), f"{address} is not an IPv6 address and a port", "write [::1]:8000"))
            elif address.startswith("/") and len(address.encode()) > _SOCKET_PATH_MAX_BYTES:
                complaints.append(((key, index), f"a socket's path has at most {_SOCKET_PATH_MAX_BYTES} bytes", ""))
            elif address.startswith("/") and not _is_directly_in(scope.runtime_dir, address):
                hint = f"write {scope.runtime_dir}/api.sock"
                complaints.append(((key, index), f"{address} is not in {scope.runtime_dir}", hint))
            elif address.startswith("/") and address.rpartition("/")[2] in (*OWN_SOCKETS, scope.port_dir.name):
                hint = f"write {scope.runtime_dir}/api.sock"
                complaints.append(((key, index), f"{address} is mmd's own", hint))
            else:
                kept[key].append(address)
            seen.add(address)
    if not _HEAD_MIN_BYTES <= gateway.max_head_bytes <= _HEAD_MAX_BYTES:
        complaints.append((("max_head",), "must be from 4KiB to 1MiB", "32KiB is the default"))
        gateway = gateway._replace(max_head_bytes=Gateway().max_head_bytes)
    gateway = gateway._replace(admin_auth=_admin_auth(gateway, kept["admin_listen"], complaints))
    return gateway._replace(listen=tuple(kept["listen"]) or Gateway().listen, admin_listen=tuple(kept["admin_listen"]))


def _admin_auth(gateway: Gateway, admin_listen: Iterable[str], complaints: list[Complaint]) -> AdminAuth:
    """Not `open` where other machines reach the admin API: who may add models there runs programs here."""
    reached = [address for address in admin_listen if not parse_address(address).is_loopback]
    if gateway.admin_auth is not AdminAuth.OPEN or not reached:
        return gateway.admin_auth
    message = f"open is for loopback only, and other machines reach gateway.admin_listen, {reached[0]}"
    complaints.append((("admin_auth",), message, "leave it out, and make a key: mmdctl keys add NAME --scope admin"))
    return Gateway().admin_auth


def check_gpus(gpus: Gpus, complaints: list[Complaint]) -> Gpus:
    """The GPUs without the devices that do not fit the provider."""
    declared = gpus.provider in (Provider.STATIC, Provider.SIM)
    kept: list[Device] = []
    for index, device in enumerate(gpus.devices):
        where = ("devices", index)
        if declared and device.memory_bytes is None:
            complaints.append((where, f"provider {gpus.provider} needs the memory of each device", "write {memory: 24GiB}"))
        elif not declared and device.memory_bytes is not None:
            hint = "name devices by index or UUID, or set provider: static"
            complaints.append((where, f"provider {gpus.provider} measures the memory itself", hint))
        elif not declared and device in kept:
            complaints.append((where, f"{device.selector} is given twice", "remove one"))
        else:
            kept.append(device)
    if declared and not gpus.devices:
        complaints.append((("devices",), f"needed by provider {gpus.provider}", "write [{memory: 24GiB}]"))
    return gpus._replace(devices=tuple(kept))


def check_resources(resources: Resources, complaints: list[Complaint]) -> Resources:
    """The resources, with the default interval where one is too short or too long."""
    kept: dict[str, Gauge] = {}
    for name, gauge in resources.commands.items():
        if _INTERVAL_MIN_S <= gauge.interval_s <= _INTERVAL_MAX_S:
            kept[name] = gauge
        else:
            complaints.append(((name, "interval"), "must be from 100ms to 1h", "1s is the default"))
            kept[name] = Gauge(gauge.command)
    return resources._replace(commands=kept)


def _is_address(address: str) -> bool:
    if not address.startswith("["):
        return True  # the pattern said it all
    import socket  # rarely needed, and slow to import for a generator

    try:
        socket.inet_pton(socket.AF_INET6, address[1 : address.index("]")])
    except OSError:
        return False
    return True
