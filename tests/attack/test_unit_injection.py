"""Text in a configuration that tries to become a directive of a unit: the engine as root, or a command of its own."""

import json

from testbed import Installation

HOSTILE = {
    "workdir": "{engine: command, command: [/bin/sleep, \"99\"], workdir: '/srv/w\\'}",
    "newline": '{engine: command, command: [/bin/sleep, "99"], workdir: "/srv\\nUser=root"}',
    "dots": '{engine: command, command: [/bin/sleep, "99"], workdir: /srv/../etc}',
    "port": "{port: '/run/mmd/ports/x\\'}",
    "noncharacter": '{args: ["\\uFDD0"]}',
    "health": '{engine: command, command: [/bin/x], health: {command: ["a\\0"]}}',
    "env": '{env: {A: "\\uFFFE"}}',
}
ACCEPTED = {
    "words": '{engine: command, command: [/x, "\\\\", ";", "a\\nUser=root", "%i", "#", " "], env: {A: "b\\nUser=root\\\\"}}',
    "blank": '{engine: command, command: [/bin/x], workdir: "/srv/a b\\"c\\\\d"}',
}


def test_no_text_becomes_a_directive(installed: Installation) -> None:
    models = {**HOSTILE, **ACCEPTED}
    lines = [f"  {name}: {{gpus: 0, id: {name}, {said[1:]}" for name, said in models.items()]
    lines.append(f"  {json.dumps('name' + chr(92))}: {{gpus: 0, id: name}}")
    installed.write("/etc/mmd/mmd.yaml", "models:\n" + "\n".join(lines) + "\n")
    installed.systemctl("stop", "mmd-reload.path")
    checked = installed.ctl("check", check=False).stdout
    installed.systemctl("daemon-reload")
    for name in (*HOSTILE, "name"):
        assert f"models.{name}" in checked, checked
        assert not installed.path(f"/run/systemd/generator/mmd-model-{name}@.service").exists()
    for name in ACCEPTED:
        unit = f"mmd-model-{name}@cpu.service"
        shown = installed.systemctl("show", "-p", "User", "-p", "Group", "-p", "ExecStart", "-p", "LoadState", unit)
        assert {f"User=mmd-m-{name}", "Group=mmd-model", "LoadState=loaded"} <= set(shown.splitlines()), shown
        assert shown.count("path=") == 1
        file = f"/run/systemd/generator/mmd-model-{name}@.service"
        verified = installed.run("systemd-analyze", "verify", "--man=no", file, check=False)
        assert verified.stderr == "", verified.stderr


def test_an_engine_is_never_root(installed: Installation) -> None:
    code = "import os,sys,time; open(os.environ[chr(68)],chr(119)).write(str(os.getuid())); time.sleep(60)"
    report = "/var/cache/mmd/models/e/uid"
    command = json.dumps(["/usr/bin/python3", "-c", code])
    installed.configure(f"models:\n  e: {{engine: command, gpus: 0, command: {command}, env: {{D: {report}}}}}\n")
    installed.systemctl("start", "--no-block", "mmd-model-e@cpu.service")
    try:
        installed.wait_until(lambda: installed.path(report).exists() and installed.read(report), what="a report of the engine")
        assert installed.read(report) not in ("", "0")
    finally:
        installed.stop_all()
        installed.path(report).unlink(missing_ok=True)
