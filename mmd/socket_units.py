"""The sockets that clients connect to and that start the gateway, as unit files (pure)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mmd.addresses import parse_address
from mmd.config import Config, Model
from mmd.errors import MmdError
from mmd.scope import Scope, ScopeKind
from mmd.unitfile import Block, Directive, Item, comment, path, render, text

__all__ = ["gateway_sockets", "made_by", "port_socket", "port_socket_name", "source_path"]

_GATEWAY = "mmd-gateway.service"
_GATEWAY_SOCKET = "mmd-gateway.socket"

_BACKLOG = Block("""
    # How many connections the kernel keeps while the gateway starts or restarts.
    Backlog=1024
""")
_NO_DELAY = Block("""
    # A token is a small packet; it must not wait for the next one.
    NoDelay=yes
""")


def port_socket_name(model: Model) -> str:
    """The file name of the unit of a model's own port."""
    return f"mmd-port-{model.id}.socket"


def gateway_sockets(config: Config, scope: Scope, with_ports: Sequence[Model]) -> Iterator[tuple[str, str]]:
    """The sockets of the gateway by file name; the first brings the ports of `with_ports` along. MmdError."""
    system = scope.kind is ScopeKind.SYSTEM
    wants: list[Item] = [comment("Whoever starts this one means the models' own ports as well.")] if with_ports else []
    wants += (("Wants", port_socket_name(model)) for model in with_ports)
    api = (*_client_socket(config.gateway.listen, system, setting="gateway.listen"), ("FileDescriptorName", "mmd-api"))
    yield _socket(_GATEWAY_SOCKET, "mmd OpenAI API", scope, api, unit=wants)
    admins = (("SocketMode", "0660"), ("SocketGroup", "mmd-admin")) if system else (("SocketMode", "0600"),)
    admin = (("ListenStream", "%t/mmd/admin.sock"), ("FileDescriptorName", "mmd-admin"), *admins)
    yield _socket("mmd-admin.socket", "mmd admin API", scope, admin)
    if config.gateway.admin_listen:
        listen = (_listen_stream(address, setting="gateway.admin_listen") for address in config.gateway.admin_listen)
        tcp = (*listen, ("FileDescriptorName", "mmd-admin-tcp"), ("NoDelay", "yes"))
        yield _socket("mmd-admin-tcp.socket", "mmd admin API and dashboard over TCP", scope, tcp)


def port_socket(model: Model, scope: Scope) -> tuple[str, str]:
    """The file name and the text of a model's own port; MmdError."""
    assert model.port is not None
    return _socket(
        port_socket_name(model),
        f"mmd port of {text(model.name, setting='the name')}",
        scope,
        (
            *_client_socket((model.port,), scope.kind is ScopeKind.SYSTEM, setting="port"),
            ("FileDescriptorName", f"mmd-port-{model.id}"),
        ),
        unit=(("PartOf", _GATEWAY_SOCKET),),
        service=f"mmd-port@{model.id}.service",
        source=model.source,
    )


def made_by(source: str) -> str:
    """The first line of a unit, for people."""
    return f"Made by mmd-generator(8) of {source}: change it there, then `mmdctl reload`"


def source_path(file: str) -> Iterator[Item]:
    """SourcePath=; nothing for a file whose name the directive cannot hold, such as a relative one."""
    with suppress(MmdError):
        yield "SourcePath", path(file, setting="")


def _client_socket(addresses: Sequence[str], system: bool, *, setting: str) -> Iterator[Item]:
    """Where clients of models connect."""
    yield from (_listen_stream(address, setting=setting) for address in addresses)
    yield _BACKLOG
    if any(not address.startswith("/") for address in addresses):
        yield _NO_DELAY
    if any(address.startswith("/") for address in addresses):
        yield from (("SocketMode", "0660"), ("SocketGroup", "mmd")) if system else (("SocketMode", "0600"),)


def _socket(
    name: str,
    description: str,
    scope: Scope,
    socket: Iterable[Item],
    *,
    unit: Iterable[Item] = (),
    service: str = _GATEWAY,
    source: Path | None = None,
) -> tuple[str, str]:
    file = str(source or scope.config_file)
    head = (
        ("Description", description),
        ("Documentation", "man:mmd.yaml(5) man:mmd-gateway(8)"),
        *source_path(file),
        *unit,
    )
    return name, render([("Unit", head), ("Socket", (*socket, ("Service", service)))], header=[f"{made_by(file)}."])


def _listen_stream(address: str, *, setting: str) -> Directive:
    where = parse_address(address)
    if where.port == 0:
        return "ListenStream", path(where.host, setting=setting)
    host = f"[{where.host}]" if ":" in where.host else where.host
    return "ListenStream", f"{host}:{where.port}"
