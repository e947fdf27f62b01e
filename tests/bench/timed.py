"""Times a command, to be run inside a testbed by any Python: `timed.py RUNS COMMAND...` prints milliseconds as JSON.

`{out}` in the command is a new empty folder in /run for every run, as systemd gives to a generator.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time


def main() -> None:
    runs, *command = sys.argv[1:]
    samples = []
    for _ in range(int(runs)):
        folder = tempfile.mkdtemp(dir="/run")
        words = [word.replace("{out}", folder) for word in command]
        begun = time.perf_counter()
        subprocess.run(words, check=True)
        samples.append((time.perf_counter() - begun) * 1000)
        shutil.rmtree(folder)
    print(json.dumps(samples))


if __name__ == "__main__":
    main()
