"""Loading: what is right takes effect, what is wrong is named with its place."""

from pathlib import Path

import pytest

from mmd.build import render
from mmd.config import Config, Device, EngineKind, Gateway, Gauge, Gpus, Health, Idle, Limits, Listen, Model, Provider, Sim
from mmd.load import load, load_files, load_text
from mmd.problem import Problem
from mmd.scope import Scope, ScopeKind

FILE = Path("/etc/mmd/mmd.yaml")
CONFIG = Path(__file__).resolve().parents[2] / "config"


def problems(text: str) -> list[str]:
    return [str(problem).removeprefix(f"{FILE}:") for problem in load_text(text, file=FILE).problems]


def scope_of(folder: Path) -> Scope:
    return Scope.system()._replace(config_dir=folder)


def test_an_empty_file_is_all_defaults() -> None:
    for text in ("", "# nothing\n", "gateway:\nmodels:\n"):
        loaded = load_text(text)
        assert loaded.problems == ()
        assert loaded.config == Config()


def test_everything() -> None:
    loaded = load_text(
        """\
gateway: {listen: ["[::1]:8000", /run/mmd/x.sock], admin_auth: open, max_body: 1MiB, loading_keepalive: never, workers: 1}
gpus: {provider: static, reserve: 0, devices: [{memory: 24GiB}]}
resources: {ram: 64GiB, license: 2, disk: 200GiB, scratch: {command: ["df-free", /scratch], interval: 5s}}
policy: {evict: lru, max_wait: 0}
defaults: {env: {A: x, B: y}, health: {timeout: 1h}, venv: /opt/default}
profiles:
  long: {args: [--long], env: {B: z}, vram: 2GiB}
models:
  org/A:
    id: a
    aliases: [x, y]
    profile: long
    model: other/A
    args: [--max-model-len, 32768]
    env: {C: 5}
    gpus: [0, 101, GPU-12ab]
    vram: 18GiB
    params: 7.6B
    precision: bf16
    ram: 3GiB
    resources: {license: 1, scratch: 18GiB}
    sleep: {level: off}
    idle: {sleep_after: 5min, stop_after: off}
    health: {interval: 100ms}
    limits: {memory_max: 64GiB, cpu_weight: 100}
  b: {engine: command, command: [/bin/x, "{port}"], listen: "tcp:18188", gpus: 0}
  c: {engine: external, endpoint: "http://127.0.0.1:9000"}
  d: {engine: sim, vram: auto, params: 1B, sim: {load_time: 100ms}}
""",
        file=FILE,
    )
    assert loaded.problems == ()
    config = loaded.config
    assert config.gateway.listen == ("[::1]:8000", "/run/mmd/x.sock")
    assert config.gateway.loading_keepalive_s is None
    assert config.gpus == Gpus(Provider.STATIC, 0, (Device(memory_bytes=24 << 30),))
    assert config.resources.ram_bytes == 64 << 30
    assert config.resources.amounts == {"license": 2, "disk": 200 << 30}
    assert config.resources.commands == {"scratch": Gauge(("df-free", "/scratch"), 5.0)}
    assert config.policy.max_wait_s == 0
    assert config.models["org/A"] == Model(
        name="org/A",
        id="a",
        engine=EngineKind.VLLM,
        aliases=("x", "y"),
        profile="long",
        model="other/A",
        venv=Path("/opt/default"),
        args=("--max-model-len", "32768"),
        env={"A": "x", "B": "z", "C": "5"},
        gpus=(0, 101, "GPU-12ab"),
        vram_bytes=18 << 30,
        params=7.6e9,
        precision="bf16",
        ram_bytes=3 << 30,
        resources={"license": 1, "scratch": 18 << 30},
        sleep_level=0,
        idle=Idle(sleep_after_s=300),
        health=Health(interval_s=0.1, timeout_s=3600),
        limits=Limits(64 << 30, 100),
        source=FILE,
        line=9,
    )
    b, c, d = (config.models[name] for name in "bcd")
    assert (b.listen, b.listen_port, b.venv, b.gpu_count) == (Listen.TCP, 18188, Path("/opt/default"), 0)
    assert (c.endpoint, c.gpu_count, c.env) == ("http://127.0.0.1:9000", 0, {})
    assert (d.vram_bytes, d.params, d.venv, d.sim) == (None, 1e9, None, Sim(load_time_s=0.1))
    assert config.resolve("y") is config.models["org/A"]


MISTAKES = [
    ("models: {tiny: {vrma: 3GiB}}", "1: models.tiny.vrma: unknown key (did you mean vram?)"),
    ("modles: {}", "1: modles: unknown key (did you mean models?)"),
    ("gateway: {lisen: []}", "1: gateway.lisen: unknown key (did you mean listen?)"),
    ("- a", "1: must be a mapping of keys (write KEY: VALUE lines)"),
    ("gateway: 5", "1: gateway: must be a mapping of keys (write KEY: VALUE lines under it)"),
    ("models: [a]", "1: models: must be a mapping of names (write NAME: on a line of its own under it)"),
    ("gateway:\n  listen: ['localhost']", "2: gateway.listen.0: 'localhost' is not an address (write 127.0.0.1:8000"),
    ("gateway: {listen: ['0.0.0.0:65536']}", "1: gateway.listen.0: '0.0.0.0:65536' is not an address"),
    ("gateway: {listen: ['[::1::]:80']}", "1: gateway.listen.0: [::1::]:80 is not an IPv6 address and a port"),
    ("gateway: {listen: ['127.0.0.1:8001']}", "1: gateway.admin_listen.0: 127.0.0.1:8001 is given twice"),
    ("gateway: {listen: []}", "1: gateway.listen: needs at least 1 item"),
    ("gateway: {workers: 0}", "1: gateway.workers: 0 is not a whole number from 1 to 64, or auto"),
    ("gateway: {max_head: 1KiB}", "1: gateway.max_head: must be from 4KiB to 1MiB"),
    ("gateway: {timeouts: {idle: 0}}", "1: gateway.timeouts.idle: 0 is not a duration above 0"),
    ("gateway: {cors_origins: ['*', 'https://a.example/x']}", "1: gateway.cors_origins.1: 'https://a.example/x' is not a web"),
    ("gateway: {request_log: yes}", "1: gateway.request_log: 'yes' is not true or false"),
    ("gateway: {max_body: 64}", "1: gateway.max_body: 64 is not a size such as 18GiB (write 18GiB, 512MiB or 2GB)"),
    ("gateway: {wait_limit: 10m}", "1: gateway.wait_limit: '10m' is not a duration"),
    ("gateway: {wait_limit: }", "1: gateway.wait_limit: has no value; it must be a duration"),
    ("gateway: {queue_limit: 1.5}", "1: gateway.queue_limit: 1.5 is not a whole number"),
    ("gpus: {provider: sim}", "1: gpus.devices: needed by provider sim (write [{memory: 24GiB}])"),
    ("gpus: {provider: static, devices: [0]}", "1: gpus.devices.0: provider static needs the memory of each device"),
    ("gpus: {devices: [{memory: 1GiB}]}", "1: gpus.devices.0: provider auto measures the memory itself"),
    ("gpus: {provider: nvml, devices: [1, 1]}", "1: gpus.devices.1: 1 is given twice"),
    ("gpus: {provider: nvml, devices: [6500]}", "1: gpus.devices.0: 6500 is not a whole number from 0 to 6499"),
    ("gpus: {devices: [{mem: 1}]}", "1: gpus.devices.0.mem: unknown key (did you mean memory?)"),
    ("resources: {scratch: {comand: [df]}}", "1: resources.scratch.comand: unknown key (known: command, interval)"),
    ("resources: {scratch: {interval: 1s}}", "1: resources.scratch: needs its command (write {command:"),
    ("resources: {scratch: {command: df}}", "1: resources.scratch.command: 'df' is not a list, each text or a whole number"),
    ("resources: {scratch: {command: []}}", "1: resources.scratch.command: needs at least 1 item"),
    ("resources: {scratch: {command: [df], interval: 50ms}}", "1: resources.scratch.interval: must be from 100ms to 1h"),
    ("resources: {scratch: {command: [df], interval: 1d}}", "1: resources.scratch.interval: must be from 100ms to 1h"),
    ("resources: {scratch: lots}", "1: resources.scratch: 'lots' is not a number of at least 0, or a size such as 18GiB"),
    ("resources: {scratch: -1}", "1: resources.scratch: -1 is not a number of at least 0"),
    ("resources: {Scratch: 1}", "1: resources.Scratch: 'Scratch' is not a resource name"),
    ("defaults: {id: x}", "1: defaults.id: unknown key"),
    ("models: {a: {engine: sglang}}", "1: models.a.engine: not yet supported: sglang (use vllm or sim or command or external)"),
    ("defaults: {port: '127.0.0.1:1'}", "1: defaults.port: unknown key"),
    ("models: {a: {gpus: 0, port: 8081}}", "1: models.a.port: 8081 is not an address (write 127.0.0.1:8000"),
    ("models: {a: {gpus: 0, port: '[::1::]:80'}}", "1: models.a.port: [::1::]:80 is not an IPv6 address and a port"),
    (f"models: {{a: {{gpus: 0, port: /{'x' * 107}}}}}", "1: models.a.port: a socket's path has at most 107 bytes"),
    ("models: {a: {gpus: 0, port_protocol: tcp}}", '1: models.a.port_protocol: needs a port (such as port: "127.0.0.1:8081")'),
    (
        "models: {a: {engine: external, endpoint: 'https://x', port: /p, port_protocol: tcp}}",
        "1: models.a.port_protocol: tcp does not reach an endpoint that speaks TLS (write http)",
    ),
    (
        "models: {a: {gpus: 0, port: '0.0.0.0:8000'}}",
        "1: models.a.port: 0.0.0.0:8000 is taken by gateway.listen, 127.0.0.1:8000 (choose another port)",
    ),
    (
        "models: {a: {gpus: 0, port: 'localhost:8001'}}",
        "1: models.a.port: localhost:8001 is taken by gateway.admin_listen, 127.0.0.1:8001",
    ),
    (
        "models: {a: {gpus: 0, port: '[::1]:81'}, b: {gpus: 0, port: '[0::1]:81'}}",
        "1: models.b.port: [0::1]:81 is taken by the port of a, [::1]:81 (choose another port)",
    ),
    (
        "models: {a: {engine: command, command: [/x], gpus: 0, listen: tcp:81, port: '[::]:81'}}",
        "1: models.a.port: [::]:81 is where its engine listens (write listen: tcp, and a free port is chosen for it)",
    ),
    (
        "models: {a: {gpus: 0, port: '127.0.0.1:81'}, b: {engine: command, command: [/x], gpus: 0, listen: tcp:81}}",
        "1: models.b.listen: tcp:81 is taken by the port of a, 127.0.0.1:81 (write tcp: a free port is chosen)",
    ),
    (
        "models: {a: {engine: command, command: [/x], gpus: 0, listen: tcp:81}, b: {gpus: 0, port: '127.0.0.1:81'}}",
        "1: models.b.port: 127.0.0.1:81 is taken by the engine of a, listen: tcp:81 (choose another port)",
    ),
    ("models: {a: {gpus: 0, filters: {drop: [x]}}}", "1: models.a.filters.drop: unknown key"),
    ("models: {a: {}}", "1: models.a.vram: needed by a model that uses a GPU"),
    ("models: {a: {engine: command, gpus: 0}}", "1: models.a.command: needed by engine command"),
    ("models: {a: {engine: external}}", "1: models.a.endpoint: needed by engine external"),
    ("models: {a: {gpus: 0, sim: {}}}", "1: models.a.sim: does not apply to engine vllm (only to sim)"),
    ("models: {a: {gpus: 0, health: {command: [x]}}}", "1: models.a.health.command: does not apply to engine vllm"),
    ("models: {a: {gpus: [1, 1], vram: 1GiB}}", "1: models.a.gpus: names a GPU twice"),
    ("models: {a: {gpus: 65, vram: 1GiB}}", "1: models.a.gpus: 65 is not a whole number from 0 to 64"),
    ("models: {a: {gpus: 0, profile: lnog}}\nprofiles: {long: {}}", "1: models.a.profile: no profile 'lnog' (did you mean"),
    ("models: {a: {gpus: 0, profile: p}}\nprofiles: {p: {foo: 1}}", "1: models.a.profile: profile 'p' has a problem"),
    ("models: {a: {gpus: 0, resources: {x: 1}}}", "1: models.a.resources.x: no such resource (declare it: resources: {x:"),
    ("models: {a: {gpus: 0, resources: {x: lots}}}", "1: models.a.resources.x: 'lots' is not a number of at least 0"),
    ("resources: {disk: {command: [x]}}\nmodels: {a: {gpus: 0, resources: {dsk: 1}}}", "2: models.a.resources.dsk: no such"),
    ("models: {a: {gpus: 0, sleep: {level: 3}}}", "1: models.a.sleep.level: 3 is not 1, 2 or off"),
    ("models: {a: {gpus: 0, env: {1A: b}}}", "1: models.a.env.1A: '1A' is not a name of an environment variable"),
    ("models: {a: {gpus: 0, env: {A: true}}}", "1: models.a.env.A: true is not text or a whole number (quote it)"),
    ("models: {a: {gpus: 0, args: [1.10]}}", "1: models.a.args.0: 1.1 is not text or a whole number (quote it)"),
    ("models: {a: {gpus: 0, args: [\"a\\0\"]}}", "1: models.a.args.0: holds U+0000"),
    ("models: {a: {gpus: 0, id: A}}", "1: models.a.id: 'A' is not a unit id"),
    ("models: {\"a\\x01\": {gpus: 0}}", "1: models.a\\x01: 'a\\x01' is not a name of 1 to 200 characters"),
    ("models: {模型: {gpus: 0}}", "1: models.模型: no unit id can be made of the model name '模型' (give the model an `id:`)"),
    ("models: {a: {gpus: 0}, A: {gpus: 0}}", "1: models.A.id: a is already the unit id of a"),
    ("models: {a: {gpus: 0, aliases: [b]}, b: {gpus: 0}}", "1: models.a.aliases.0: 'b' is the name of the model at"),
    ("models: {a: {gpus: 0, aliases: [x]}, b: {gpus: 0, aliases: [x]}}", "1: models.b.aliases.0: 'x' is already an alias of a"),
    ("models: {a: {gpus: 0, aliases: [x, x]}}", "1: models.a.aliases.1: 'x' is given twice"),
    ("models:\n  a: {gpus: 0}\n  a: {gpus: 0}", "3: models.a: given twice, first in line 2"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "problem"), MISTAKES)
def test_mistakes(text: str, problem: str) -> None:
    found = problems(text)
    assert [line for line in found if line.startswith(problem)], found


def test_the_mistake_is_placed_where_it_is_written() -> None:
    text = "defaults:\n  gpus: [0, 0]\nprofiles:\n  p:\n    sim: {}\nmodels:\n  a: {profile: p, vram: 1GiB}\n"
    assert problems(text) == [
        "2: models.a.gpus: names a GPU twice",
        "5: models.a.sim: does not apply to engine vllm (only to sim)",
    ]


def test_a_bad_model_is_left_out_and_the_others_stay() -> None:
    text = "models:\n  bad: {vrma: 1, gpus: 0, gpus: 1}\n  twice: {gpus: 0, id: x, id: y}\n  good: {gpus: 0}\n"
    loaded = load_text(text)
    assert list(loaded.config.models) == ["good"]
    assert len(loaded.problems) == 3


def test_a_bad_value_falls_back_to_its_default() -> None:
    loaded = load_text("gateway: {listen: 5, queue_limit: 7}\ndefaults: {vrma: 1, pin: true}\nmodels: {a: {gpus: 0}}\n")
    assert loaded.config.gateway == Gateway(queue_limit=7)
    assert loaded.config.models["a"].pin
    assert len(loaded.problems) == 2


@pytest.mark.parametrize(
    ("address", "exposed"),
    [
        *(
            (address, 0)
            for address in ("127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[0:0::0:1]:1", "localhost:1", "/run/mmd/x.sock")
        ),
        *((address, 1) for address in ("0.0.0.0:1", "[::]:1", "192.0.2.1:1", "[::ffff:127.0.0.1]:1", "[2001:db8::1]:1")),
    ],
)
def test_what_other_machines_reach(address: str, exposed: int) -> None:
    loaded = load_text(f"gateway: {{listen: ['{address}'], admin_listen: []}}", file=FILE)
    assert loaded.problems == ()
    assert len(loaded.warnings_where(keys_asked_for=False)) == exposed
    assert loaded.warnings_where(keys_asked_for=True) == ()


def test_what_looks_secret_in_env_is_warned_of() -> None:
    loaded = load_text(
        "defaults: {env: {A: x}}\nmodels:\n  m:\n    engine: sim\n    gpus: 0\n    env:\n      HF_TOKEN: abc\n", file=FILE
    )
    (warning,) = loaded.warnings_where(keys_asked_for=True)
    assert (warning.line, warning.key) == (7, "models.m.env.HF_TOKEN")
    assert "secrets: {HF_TOKEN: /" in warning.hint
    assert "abc" not in str(warning)


def test_an_open_admin_api_is_for_loopback() -> None:
    loaded = load_text("gateway:\n  admin_listen: ['127.0.0.1:1', '[::]:2']\n  admin_auth: open\n", file=FILE)
    (problem,) = loaded.problems
    assert (problem.line, problem.key) == (3, "gateway.admin_auth")
    assert loaded.config.gateway.admin_auth is Gateway().admin_auth
    assert problems("gateway: {admin_listen: ['127.0.0.1:1'], admin_auth: open}") == []


def test_several_files(tmp_path: Path) -> None:
    (tmp_path / "mmd.yaml").write_text("defaults: {gpus: 0}\nmodels:\n  a:\n")
    folder = tmp_path / "models.d"
    folder.mkdir()
    (folder / "20-c.yaml").write_text("models:\n  c:\n\n  a: {pin: true}\n")
    (folder / "10-b.yaml").write_text("models: {b: }\ngateway: {}\n")
    (folder / ".hidden.yaml").write_text("nonsense")
    (folder / "README").write_text("nonsense")
    (folder / "d.yml").write_text("models: {d: }\n")
    loaded = load(scope_of(tmp_path))
    assert [(m.name, m.gpus, m.pin, m.source.name, m.line) for m in loaded.config.models.values()] == [
        ("a", 0, False, "mmd.yaml", 3),
        ("b", 0, False, "10-b.yaml", 1),
        ("c", 0, False, "20-c.yaml", 2),
    ]
    assert [str(problem) for problem in loaded.problems] == [
        f"{folder}/d.yml: not read: the name must end in .yaml (mv {folder}/d.yml {folder}/d.yaml)",
        f"{folder}/10-b.yaml:2: gateway: unknown key (known: models)",
        f"{folder}/20-c.yaml:4: models.a: already defined at {tmp_path}/mmd.yaml:3 (remove one of the two)",
    ]


def test_no_file(tmp_path: Path) -> None:
    loaded = load(scope_of(tmp_path))
    assert loaded.config == Config()
    (problem,) = loaded.problems
    assert problem == Problem(tmp_path / "mmd.yaml", 0, "", "no such file", problem.hint)
    assert "mmd.yaml(5)" in problem.hint


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "mmd.yaml").mkdir()
    (tmp_path / "models.d").write_text("")
    assert [str(problem) for problem in load(scope_of(tmp_path)).problems] == [
        f"{tmp_path}/models.d: cannot be read: Not a directory",
        f"{tmp_path}/mmd.yaml: cannot be read: Is a directory",
    ]


def test_a_socket_path_that_is_too_long() -> None:
    scope = Scope.system()._replace(kind=ScopeKind.USER, model_dir=Path("/run/user/1000") / ("x" * 60))
    text = f"models: {{{'m' * 63}: {{gpus: 0}}}}"
    (problem,) = load_files([(FILE, text)], scope=scope).problems
    assert problem.message.endswith("bytes too long")
    assert problem.hint == "give the model a shorter id"
    command = f"models: {{{'m' * 63}: {{gpus: 0, engine: command, command: [/bin/x]}}}}"
    assert load_files([(FILE, command)], scope=scope).problems == ()


@pytest.mark.parametrize("file", sorted((CONFIG / "examples").iterdir()), ids=lambda file: file.name)
def test_examples(file: Path) -> None:
    loaded = load_text(file.read_text(), file=file)
    assert loaded.problems == ()
    assert loaded.config.models


@pytest.mark.parametrize("file", sorted((CONFIG / "examples").iterdir()), ids=lambda file: file.name)
def test_render_reads_back(file: Path) -> None:
    config = load_text(file.read_text(), file=file).config
    again = load_text(render(config))
    assert again.problems == ()
    models = {m.name: m._replace(profile=None, source=Path("mmd.yaml"), line=0) for m in config.models.values()}
    assert {m.name: m._replace(line=0) for m in again.config.models.values()} == models
    assert again.config._replace(models={}) == config._replace(models={})


@pytest.mark.parametrize(
    "path",
    [
        "/etc/mmd/api-keys.yaml",
        "/run/mmd/registrar.sock",
        "/run/mmd/x.sock",
        "/run/mmd/ports",
        "/run/mmd/ports/",
        "/run/mmd/ports/a/b",
        "/run/mmd/ports//a",
        "/run/mmd/ports/../x",
        "/run/mmd/ports/.a",
        "/run/mmd/ports/a b",
        "//run/mmd/ports/a",
    ],
)
def test_ports_are_sockets_in_our_own_directory(path: str) -> None:
    """PID 1 removes what is at the path of a socket unit."""
    loaded = load_text(f"models: {{a: {{gpus: 0, port: {path!r}}}}}")
    assert loaded.config.models == {}
    assert loaded.problems[0].key == "models.a.port"


@pytest.mark.parametrize("key", ["gpu-probe.sock", "admin.sock", "registrar.sock", "ports", "ports/a", "../x", "", ".x", "a/b"])
def test_the_gateway_listens_in_our_own_directory(key: str) -> None:
    loaded = load_text(f"gateway: {{listen: ['/run/mmd/{key}']}}")
    assert loaded.config.gateway.listen == ("127.0.0.1:8000",)
    assert loaded.problems[0].key == "gateway.listen.0"


def test_sockets_of_ours() -> None:
    text = "gateway: {listen: [/run/mmd/api.sock]}\nmodels: {a: {gpus: 0, port: /run/mmd/ports/a.sock}}"
    assert load_text(text).problems == ()
    user = Scope.user({"HOME": "/h", "XDG_RUNTIME_DIR": "/run/user/5"})
    assert load_text("models: {a: {gpus: 0, port: /run/user/5/mmd/ports/a.sock}}", scope=user).problems == ()
