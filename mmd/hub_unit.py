"""The unit that fetches a model's weights from a hub before its engine starts (pure).

Engines have no network. So what they would download is fetched by mmd-fetch-<id>.service, which runs as a user of its own and
alone may write the cache that all engines read (mmd.hub.fetch). It runs before each start, and is done at once when everything
is there.
"""

from _blake2 import blake2b  # hashlib would load OpenSSL: 5 ms of the generator's 60
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mmd.config import EngineKind, Model
from mmd.sandbox import ANYWHERE, ISOLATION, NO_DEVICES
from mmd.scope import Scope, ScopeKind
from mmd.socket_units import made_by, source_path
from mmd.unitfile import Block, Item, assignment, command_line, comment, path, render, text

__all__ = ["Wanted", "cache_environment", "fetch_unit", "fetch_unit_name", "wanted"]

_OWN_CACHE = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "VLLM_USE_MODELSCOPE")
"""A model whose `env` sets one of these has its weights elsewhere, or from another hub."""

_PASSED_ON = frozenset(
    ["HF_ENDPOINT", "HF_TOKEN", "HF_HUB_DOWNLOAD_TIMEOUT", "SSL_CERT_FILE", "SSL_CERT_DIR"]
    + [name for each in ("http_proxy", "https_proxy", "all_proxy", "no_proxy") for name in (each, each.upper())]
)
"""Of a model's `env` what says how the hub is reached."""

_TOKEN = "HF_TOKEN"  # noqa: S105 - the name of a variable

_WHO_ANSWERS = ("HF_ENDPOINT", "SSL_CERT_DIR", "SSL_CERT_FILE")
"""Who is believed to be the hub. Members of mmd-admin set `env` too: what they name must not fill the cache of other models."""

_OPTIONS = ("--tokenizer", "--hf-config-path")

_START_ANYWAY = Block("""
Documentation=man:mmd-generator(8)
# The gateway counts failures and backs off by itself.
StartLimitIntervalSec=0
""")

_FETCHER = Block("""
User=mmd-fetch
Group=mmd-fetch
Type=oneshot
# It gives up by itself when nothing comes any more; how long a download takes depends on the line.
TimeoutStartSec=infinity
# All engines read it.
CacheDirectory=mmd/huggingface
CacheDirectoryMode=0755
UMask=0022
Slice=mmd-models.slice
SyslogLevelPrefix=no
ProtectHome=yes
MemoryDenyWriteExecute=yes
""")

_NETWORK = Block("""
# It needs the network, but no host of the link: there clouds tell an instance its secrets, and so do the other addresses
# (fd00:ec2::254 Amazon, fd20:ce::254 Google, 100.100.100.200 Alibaba, 192.0.0.192 Oracle). Loopback stays: many a resolver and
# proxy is there. Where the only resolver has an address of the link, allow it by a drop-in: IPAddressAllow=169.254.169.253
IPAddressDeny=169.254.0.0/16 fe80::/10 multicast
IPAddressDeny=fd00:ec2::254/128 fd20:ce::254/128 100.100.100.200/32 192.0.0.192/32
""")

_RUN = Block("""
# Of /run it sees what names are resolved by, and its own directory.
TemporaryFileSystem=/run:ro,mode=0755,nosuid,nodev
BindReadOnlyPaths=-/run/systemd/resolve -/run/resolvconf -/run/NetworkManager/resolv.conf -/run/nscd
""")


class Wanted(NamedTuple):
    """A repository of a hub, at a revision: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def wanted(model: Model, scope: Scope) -> tuple[Wanted, ...]:
    """What has to be fetched before the model's engine starts: nothing where the engine does that itself (a user's own
    instance), or where its `env` says that it brings its weights with it, or wants no downloads."""
    if model.engine is not EngineKind.VLLM or scope.kind is ScopeKind.USER or _brings_its_own(model.env):
        return ()
    revision = _option(model.args, "--revision") or "main"
    main = (_repository(model.model or model.name, revision),)
    tokenizer = _option(model.args, "--tokenizer-revision") or "main"
    others = (
        *(_repository(_option(model.args, option) or "", tokenizer) for option in _OPTIONS),
        *(_repository(path) for path in model.lora.values()),
        _draft(model.args),
    )
    return tuple(dict.fromkeys(each for each in (*main, *others) if each is not None))


def fetch_unit_name(unit_id: str) -> str:
    """The file name of the unit that fetches a model's weights."""
    return f"mmd-fetch-{unit_id}.service"


def cache_environment(model: Model, scope: Scope, home: str) -> Mapping[str, str]:
    """The variables by which huggingface_hub of a system engine finds the shared cache, and asks no hub; `home` is what it may
    write."""
    own = {"HF_HOME": f"{home}/huggingface"}
    if _brings_its_own(model.env) or (model.engine is not EngineKind.VLLM and "HF_ENDPOINT" in model.env):
        return own  # a hub on loopback, the only one that a `command` could ever reach
    return own | {
        "HF_HUB_CACHE": str(_cache(model, scope)),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def fetch_unit(model: Model, *, scope: Scope, bin_dir: str) -> str | None:
    """The text of the unit; None when there is nothing to fetch."""
    repositories = wanted(model, scope)
    if not repositories:
        return None
    sections = (("Unit", _unit(model)), ("Service", _service(model, repositories, scope, bin_dir)))
    return render(sections, header=(made_by(f"{model.source}:{model.line}") + ".",))


def _unit(model: Model) -> Iterator[Item]:
    yield from source_path(str(model.source))
    yield "Description", f"mmd weights of {text(model.name, setting='the name')}"
    yield _START_ANYWAY


def _service(model: Model, repositories: tuple[Wanted, ...], scope: Scope, bin_dir: str) -> Iterator[Item]:
    yield _FETCHER
    words = (f"{bin_dir}/python", "-I", "-m", "mmd.hub.fetch", *map(str, repositories))
    yield "ExecStart", command_line(words, setting="model, lora or args")
    home = str(scope.hub_dir)
    variables = {"HOME": home, "HF_HOME": home, "HF_HUB_CACHE": str(_cache(model, scope))}
    variables |= {name: value for name, value in model.env.items() if name in _PASSED_ON}
    for name, value in variables.items():
        yield "Environment", assignment(name, value, setting=f"env.{name}")
    if _TOKEN in model.secrets:
        yield "LoadCredential", f"{_TOKEN}:{path(str(model.secrets[_TOKEN]), setting=f'secrets.{_TOKEN}')}"
    yield "WorkingDirectory", path(str(scope.hub_dir), setting="the cache's folder")
    yield "RuntimeDirectory", f"mmd-fetch/{model.id}"
    yield comment("The gateway reads there why nothing was fetched.")
    yield "RuntimeDirectoryPreserve", "yes"
    yield "SyslogIdentifier", f"mmd-fetch-{model.id}"
    yield "LogExtraFields", f"MMD_MODEL={model.id} MMD_ROLE=fetch"
    yield from (ANYWHERE, ISOLATION, NO_DEVICES, _NETWORK, _RUN)
    yield "BindPaths", f"/run/mmd-fetch/{model.id}"


def _cache(model: Model, scope: Scope) -> Path:
    """One cache for each hub: of the same name two hubs may have different weights."""
    said = [f"{name}={model.env[name]}" for name in _WHO_ANSWERS if name in model.env]
    if model.env.get("HF_ENDPOINT", "").lower().startswith("http:"):  # then a proxy may answer as it likes
        said += sorted(f"{name}={value}" for name, value in model.env.items() if name.lower().endswith("_proxy"))
    # Members of mmd-admin choose what is hashed: a short hash of another hub's could be found. No variable has a NUL.
    digest = blake2b("\0".join(said).encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return scope.hub_dir / (f"hub-{digest}" if said else "hub")


def _brings_its_own(env: Mapping[str, str]) -> bool:
    return any(name in env for name in _OWN_CACHE) or env.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")


def _repository(name: str, revision: str = "main") -> Wanted | None:
    """None for a path, for nothing, and for what no hub has, such as s3://."""
    if not name or name.startswith(("/", ".")) or "://" in name:
        return None
    return Wanted(name.partition(":")[0], revision)  # org/name:Q4_K_M is a file of a repository


def _option(args: tuple[str, ...], *names: str) -> str | None:
    """The value of the last of these options in `args`, in any spelling that vLLM takes."""
    found = None
    for index, arg in enumerate(args):
        option, separator, value = arg.partition("=")
        if option.replace("_", "-") in names and arg.startswith("--"):
            found = value if separator else args[index + 1] if index + 1 < len(args) else None
    return found


def _draft(args: tuple[str, ...]) -> Wanted | None:
    """The smaller model that guesses ahead (speculative decoding)."""
    text = _option(args, "--speculative-config")
    if text is None:
        return None
    import json  # not for every start of the generator

    try:
        said = json.loads(text)
        return _repository(str(said["model"]), str(said.get("revision") or "main")) if said.get("model") else None
    except (ValueError, AttributeError, TypeError):
        return None  # vLLM says what is wrong with it
