"""The cache of 0.1.0, which every engine could write, when mmd is upgraded in place."""

from testbed import Installation


def test_no_model_finds_what_an_engine_left_for_it(installed: Installation) -> None:
    """Python of a later model would import it, with that model's secrets in its environment."""
    installed.run("useradd", "--system", "--gid", "mmd-model", "mmd-model")
    planted = "/var/cache/mmd/models/later/.local/lib/python3/site-packages/evil.pth"
    installed.write(planted, "")
    installed.write(planted.replace("models", "private"), "")
    installed.run("ln", "-s", "/etc", "/var/cache/mmd/models/link")
    installed.write("/var/cache/mmd/huggingface/hub/weights", "weights")
    installed.run("chown", "--recursive", "mmd-model:mmd-model", "/var/cache/mmd")
    installed.up("--no-request")
    for folder in ("models", "private"):
        assert list(installed.path(f"/var/cache/mmd/{folder}").iterdir()) == []
    assert sorted(path.name for path in installed.path("/var/cache/mmd").iterdir()) == ["huggingface", "models", "private"]
    owners = installed.run("stat", "--format=%U", "/var/cache/mmd", "/var/cache/mmd/models", "/etc").stdout.split()
    assert set(owners) == {"root"}
    owner = installed.run("stat", "--format=%U", "/var/cache/mmd/huggingface/hub/weights").stdout.strip()
    assert owner == "mmd-fetch", "they are not fetched again"
