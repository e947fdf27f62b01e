"""Secrets of models in a real systemd: the engine has them, and nobody else, whatever is asked and read."""

import json
from collections.abc import Iterator
from hashlib import sha256

import pytest
from testbed import Installation

TOKEN = "hf_TheSecretOfTheHolder"
OTHER = "hf_TheSecretOfTheSpy"
CONTROL = "ControlValueOfEnv"
"""In `env`, which everybody can read: proof that a search finds what is there."""

ENGINE = """
import hashlib, http.server, os, pathlib, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

token = os.environ["HF_TOKEN"]
print("token is", token, "digest is", hashlib.sha256(token.encode()).hexdigest(), flush=True)
print("folder is", os.environ.get("CREDENTIALS_DIRECTORY"), flush=True)
if sys.argv[1] == "dies":
    sys.exit(3)
if sys.argv[1] == "spy":
    read, found = [], []
    fixed = map(pathlib.Path, ["/run/credentials/mmd-model-holder@cpu.service/HF_TOKEN", "/etc/mmd/secrets/holder"])
    proc = pathlib.Path("/proc")
    for path in [*fixed, *pathlib.Path("/run/credentials").glob("*/*"), *proc.glob("[0-9]*/environ"),
                 *proc.glob("[0-9]*/root/run/credentials/*/*")]:
        try:
            text = path.read_bytes()
        except OSError:
            continue
        read.append(str(path))
        if b"TheSecretOfTheHolder" in text:
            found.append(str(path))
    own = any("mmd-model-spy@cpu.service/HF_TOKEN" in path for path in read)
    print("spy read its own:", own, "and found", found, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Answer).serve_forever()
"""

MODELS = f"""
gpus: {{provider: sim, devices: [{{memory: 24GiB}}]}}
defaults: {{engine: command, gpus: 0}}
models:
  holder:
    command: [/usr/bin/python3, /srv/secrets/engine.py, holds, "{{port}}"]
    secrets: {{HF_TOKEN: /etc/mmd/secrets/holder}}
    env: {{CONTROL: {CONTROL}}}
  spy:
    command: [/usr/bin/python3, /srv/secrets/engine.py, spy, "{{port}}"]
    secrets: {{HF_TOKEN: /etc/mmd/secrets/spy}}
  dies:
    command: [/usr/bin/python3, /srv/secrets/engine.py, dies, "{{port}}"]
    secrets: {{HF_TOKEN: /etc/mmd/secrets/holder}}
  gone:
    command: [/usr/bin/python3, /srv/secrets/engine.py, holds, "{{port}}"]
    secrets: {{HF_TOKEN: /etc/mmd/secrets/gone}}
"""


@pytest.fixture(scope="module")
def configured(installation: Installation) -> Iterator[None]:
    installation.write("/srv/secrets/engine.py", ENGINE)
    installation.run("install", "-d", "-m", "0700", "/etc/mmd/secrets")
    installation.write("/etc/mmd/secrets/holder", f"{TOKEN}\n", 0o600)
    installation.write("/etc/mmd/secrets/spy", OTHER, 0o600)
    installation.configure(MODELS)
    yield
    installation.stop_all()
    installation.configure("gpus: {provider: sim, devices: [{memory: 24GiB}]}\n")


@pytest.fixture
def serving(configured: None, installed: Installation) -> Installation:
    return installed


def shell(installed: Installation, command: str, user: str | None = None) -> str:
    """What a command prints, of that what is ASCII; some of what attackers try fails."""
    printed = rf"{{ {command}; }} 2>&1 | LC_ALL=C tr -cd '[:print:]\n'"
    return installed.run("bash", "-c", printed, user=user, check=False).stdout


def test_the_engine_has_its_secret_and_nobody_else(serving: Installation) -> None:
    serving.ctl("start", "holder")
    serving.ctl("start", "spy")
    unit = "mmd-model-holder@cpu.service"
    runner = serving.show(unit, "MainPID")
    holder = serving.journal("MMD_MODEL=holder")
    assert f"token is *** digest is {sha256(TOKEN.encode()).hexdigest()}" in holder
    assert "folder is None" in holder
    spy = serving.journal("MMD_MODEL=spy")
    assert f"digest is {sha256(OTHER.encode()).hexdigest()}" in spy
    assert "spy read its own: True and found []" in spy

    eve = {
        "properties": f"systemctl show {unit}; systemctl cat {unit}; systemctl status -l {unit}",
        "files": "grep -rhsa . /run/systemd/generator* /run/mmd* /etc/mmd /run/credentials /var/lib/mmd /var/cache/mmd",
        "processes": r"cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\0' '\n'",
        "runner": f"cat /proc/{runner}/environ; cat /proc/{runner}/root/run/credentials/{unit}/HF_TOKEN",
        "credential": f"cat /run/credentials/{unit}/HF_TOKEN /etc/mmd/secrets/holder",
    }
    seen = {what: shell(serving, command, "eve") for what, command in eve.items()}
    assert CONTROL in seen["properties"]
    assert CONTROL in seen["files"]
    assert "engine.py" in seen["processes"]
    assert seen["credential"].count("Permission denied") == 2, seen["credential"]
    assert TOKEN not in str(seen)

    api = "curl -s --unix-socket /run/mmd/admin.sock http://localhost/api/v1"
    anybody = {
        "config": f"{api}/config",
        "status": f"{api}/status; mmdctl status --json; mmdctl show holder; mmdctl show holder --json; mmdctl list",
        "read": "mmdctl config; mmdctl check --json; mmdctl cat holder; mmdctl logs holder",
        "events": "mmdctl events --json; curl -s -m 1 --unix-socket /run/mmd/admin.sock http://localhost/api/v1/events",
        "journal": "journalctl --output=export --no-pager",
        "runner": rf"cat /proc/{runner}/cmdline /proc/{runner}/environ | tr '\0' '\n'",
        "kept": "grep -rhsa . /run/mmd* /run/systemd/generator* /var/lib/mmd",
    }
    told = {what: shell(serving, command) for what, command in anybody.items()}
    assert json.loads(told["config"])["models"]["holder"]["secrets"] == {"HF_TOKEN": "/etc/mmd/secrets/holder"}
    assert CONTROL in told["read"]
    assert "token is ***" in told["journal"]
    assert "--secret" in told["runner"]
    assert TOKEN not in str(told)
    assert OTHER not in str(told)


def test_a_failure_tells_the_file_and_not_the_secret(serving: Installation) -> None:
    gone = serving.ctl("start", "gone", check=False)
    assert gone.returncode != 0
    assert "models.gone.secrets.HF_TOKEN: /etc/mmd/secrets/gone is missing or empty" in gone.stdout + gone.stderr
    dies = serving.ctl("start", "dies", check=False)
    body = json.dumps({"model": "dies", "messages": []})
    answer = shell(serving, f"curl -s {serving.api}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
    assert "token is ***" in answer
    assert TOKEN not in dies.stdout + dies.stderr + answer + serving.ctl("show", "dies", "--json").stdout


def test_a_member_of_mmd_admin_gets_no_file_of_roots(serving: Installation) -> None:
    command = "mmdctl add thief --engine command --gpus 0 --set 'command=[/bin/env]' --set secrets.X=/etc/shadow"
    assert "models.thief.secrets: only root may set it" in shell(serving, command, "mallory")
    assert not serving.path("/etc/mmd/models.d/thief.yaml").exists()
