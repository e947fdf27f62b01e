"""The ledger of simulated GPU memory: all or nothing, freed by death, never over-committed under storms of kills."""

import os
import random
import signal
import stat
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mmd.errors import MmdError
from mmd.sim.ledger import Ledger, OutOfMemoryError

TOTAL = 1000

STORM = """
import random, sys, time
from pathlib import Path
from mmd.sim.ledger import Ledger, OutOfMemoryError
seed, directory = int(sys.argv[1]), Path(sys.argv[2])
chance = random.Random(seed)
ledger = Ledger(directory)
while True:
    gpus = chance.choice([(0,), (1,), (0, 1)])
    try:
        claim = ledger.claim(chance.randint(100, 600), owner=str(seed), totals={gpu: 1000 for gpu in gpus})
        for _ in range(3):
            claim.resize(chance.randint(1, 700))
        claim.release()
    except OutOfMemoryError:
        pass
"""

HOLD = """
import sys, time
from pathlib import Path
from mmd.sim.ledger import Ledger
claim = Ledger(Path(sys.argv[1])).claim(int(sys.argv[2]), owner="holder", totals={0: 1000})
print("held", flush=True)
time.sleep(60)
"""


def used(ledger: Ledger) -> dict[int, int]:
    sums: Counter[int] = Counter()
    for allocation in ledger.read():
        sums[allocation.gpu] += allocation.bytes
    return dict(sums)


def test_claim_resize_release(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    claim = ledger.claim(600, owner="a", totals={0: TOTAL, 1: TOTAL})
    assert used(ledger) == {0: 600, 1: 600}
    assert {allocation.pid for allocation in ledger.read()} == {os.getpid()}
    claim.resize(30)
    assert used(ledger) == {0: 30, 1: 30}
    claim.resize(1000)
    assert used(ledger) == {0: 1000, 1: 1000}
    claim.release()
    assert used(ledger) == {}
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_claim_on_two_gpus_is_all_or_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first = ledger.claim(500, owner="a", totals={1: TOTAL})
    with pytest.raises(OutOfMemoryError, match="GPU 1 has 500 of 1000 bytes free; b needs 501"):
        ledger.claim(501, owner="b", totals={0: TOTAL, 1: TOTAL})
    assert used(ledger) == {1: 500}
    first.release()


def test_a_failed_resize_keeps_what_was_held(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    first, second = (ledger.claim(400, owner=name, totals={0: TOTAL}) for name in "ab")
    with pytest.raises(OutOfMemoryError):
        first.resize(601)
    assert used(ledger) == {0: 800}
    second.release()
    first.resize(1000)
    first.release()


def test_nothing_was_ever_allocated(tmp_path: Path) -> None:
    assert Ledger(tmp_path).read() == ()
    assert Ledger(tmp_path / "missing").read() == ()
    with pytest.raises(MmdError, match="does not exist"):
        Ledger(tmp_path / "missing").claim(1, owner="a", totals={0: 10})


def test_create_makes_a_directory_for_the_group(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "a" / "sim")
    ledger.create()
    assert stat.S_IMODE(ledger.directory.stat().st_mode) == 0o2770


def test_a_killed_owner_frees_at_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "700"], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert used(ledger) == {0: 700}
        with pytest.raises(OutOfMemoryError):
            ledger.claim(400, owner="b", totals={0: TOTAL})
        holder.kill()
    assert used(ledger) == {}
    assert any(path.name.startswith("gpu0-") for path in tmp_path.iterdir()), "a reader removes nothing"
    ledger.claim(1000, owner="b", totals={0: TOTAL}).release()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "a writer sweeps"


def test_a_stopped_holder_of_the_lock_bounds_the_wait(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.claim(1, owner="a", totals={0: 10}).release()
    code = "import fcntl,sys,time; f=open(sys.argv[1]); fcntl.flock(f,2); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        started = time.monotonic()
        with pytest.raises(MmdError, match="has been locked"):
            ledger.read()
        assert time.monotonic() - started < 4
        holder.kill()


def test_storm_of_kills_never_over_commits(tmp_path: Path) -> None:
    """Processes that allocate, grow, shrink and free as fast as they can, killed and replaced at random."""
    ledger = Ledger(tmp_path)
    chance = random.Random(7)
    seeds = iter(range(10_000))

    def spawn() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", STORM, str(next(seeds)), str(tmp_path)])

    processes = [spawn() for _ in range(6)]
    readings = busy = kills = 0
    deadline = time.monotonic() + 5
    try:
        while time.monotonic() < deadline:
            sums = used(ledger)
            assert all(total <= TOTAL for total in sums.values()), sums
            readings += 1
            busy += bool(sums)
            if chance.random() < 0.02:
                victim = chance.randrange(len(processes))
                assert processes[victim].poll() is None, "a process of the storm failed"
                processes[victim].send_signal(signal.SIGKILL)
                processes[victim].wait()
                processes[victim] = spawn()
                kills += 1
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert used(ledger) == {}
    assert kills > 5
    assert busy > 20, (readings, busy)
