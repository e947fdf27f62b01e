"""Paths of sockets that PID 1 would remove or make as root."""

import pytest
from testbed import Installation

VICTIM = "/root/precious"


@pytest.mark.parametrize(
    "text",
    [
        f"models: {{v: {{gpus: 0, port: {VICTIM}}}}}",
        f"gateway: {{listen: [{VICTIM}]}}",
        "models: {v: {gpus: 0, port: /root/made/by/systemd}}",
        "models: {v: {gpus: 0, port: /run/mmd/registrar.sock}}",
    ],
)
def test_no_file_is_removed_and_no_folder_made(installed: Installation, text: str) -> None:
    installed.write(VICTIM, "keep me", mode=0o600)
    installed.systemctl("stop", "mmd-reload.path")
    installed.write("/etc/mmd/mmd.yaml", text + "\n")
    assert installed.ctl("check", check=False).returncode != 0
    installed.systemctl("daemon-reload")
    installed.systemctl("start", "mmd-port-v.socket", check=False)
    installed.systemctl("restart", "mmd-gateway.socket", check=False)
    assert installed.read(VICTIM) == "keep me"
    assert not installed.path("/root/made").exists()
    assert installed.path("/run/mmd/ports").stat().st_uid == 0
    installed.configure("models: {}")
