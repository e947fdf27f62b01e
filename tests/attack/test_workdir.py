"""A working directory that takes the place of what hides /run from engines: of two mounts at one path systemd keeps that of
ReadWritePaths= and drops that of TemporaryFileSystem=. Members of mmd-admin choose working directories; only root a `user`."""

import json

from testbed import Installation

PROGRAM = "/opt/attack/look.py"
LOOK = """
import http.server, json, os, pathlib, sys
seen = [path for path in json.loads(sys.argv[3]) if os.path.lexists(path)]
written = pathlib.Path(os.getcwd(), "written")
try:
    written.write_text("")
except OSError:
    pass
pathlib.Path(sys.argv[2]).write_text(json.dumps([seen, written.exists()]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
HIDDEN = ["/run/dbus", "/run/mmd", "/run/mmd-sim", "/run/systemd/journal", "/run/mmd-model/victim@cpu"]

WORKDIRS = {"run": "/run", "link": "/home/mallory/run"}


def command(name: str) -> str:
    return f"[/usr/bin/python3, {PROGRAM}, '{{port}}', /run/mmd-model/{name}@cpu/result, '{json.dumps(HIDDEN)}']"


def looked(installed: Installation, name: str) -> tuple[list[str], bool]:
    """What of HIDDEN an engine has seen, and whether it could write where it was started."""
    seen, writes = json.loads(installed.read(f"/run/mmd-model/{name}@cpu/result"))
    return seen, writes


def test_no_working_directory_uncovers_what_is_hidden(installed: Installation) -> None:
    installed.write(PROGRAM, LOOK)
    installed.run("ln", "-sfn", "/run", "/home/mallory/run")
    installed.run("ln", "-sfn", "/run", "/home/eve/run")
    installed.run("chmod", "755", "/home/mallory", "/home/eve")
    installed.run("install", "-d", "-o", "eve", "/home/eve/work")
    models = [f"  {name}: {{command: {command(name)}, workdir: {path}}}" for name, path in WORKDIRS.items()]
    models += [
        "  victim: {engine: sim}",
        f"  eves-link: {{command: {command('eves-link')}, workdir: /home/eve/run, user: eve}}",
        f"  eves: {{command: {command('eves')}, workdir: /home/eve/work, user: eve}}",
    ]
    installed.configure("defaults: {engine: command, gpus: 0}\nmodels:\n" + "\n".join(models) + "\n")
    names = [*WORKDIRS, "eves-link", "eves"]
    installed.systemctl("start", *(f"mmd-model-{name}@cpu.service" for name in ("victim", *names)))
    assert {name: looked(installed, name) for name in WORKDIRS} == {name: ([], False) for name in WORKDIRS}
    assert "/run/mmd-model/victim@cpu" not in looked(installed, "eves-link")[0]
    assert looked(installed, "eves") == ([], True)
    installed.stop_all()
