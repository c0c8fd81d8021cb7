"""Processes of their own, on simulated devices: what matters is who waits for whom."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from waiting import wait_until

from profiler.workers import one_each

BUILD_S = {"quick": 0.0, "slow": 0.6, "fails": 0.3}


def work(device, ready, folder):
    """Builds for as long as its device says, then measures."""
    time.sleep(BUILD_S[device])
    if device == "fails":
        raise SystemExit(3)
    built = time.monotonic()
    ready()
    times = {"built": built, "measuring": time.monotonic(), "pid": os.getpid()}
    (Path(folder) / device).write_text(json.dumps(times))


@pytest.mark.parametrize("devices", [("quick", "slow"), ("quick", "fails", "slow")])
def test_nobody_measures_before_everybody_has_built(tmp_path, devices):
    failed = one_each(work, devices, str(tmp_path))
    assert failed == [device for device in devices if device == "fails"]
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(found) == {"quick", "slow"}
    last_built = max(times["built"] for times in found.values())
    assert all(times["measuring"] >= last_built for times in found.values())
    assert len({times["pid"] for times in found.values()} | {os.getpid()}) == 3


def never_ends(device, ready, folder):
    (Path(folder) / device).write_text(str(os.getpid()))
    while True:
        time.sleep(1)


STARTS = """
import sys
from test_workers import never_ends
from profiler.workers import one_each
if __name__ == "__main__":
    one_each(never_ends, ("one", "other"), sys.argv[1])
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_their_parent_however_that_is_killed(tmp_path, how):
    script = tmp_path / "starts.py"
    script.write_text(STARTS)
    folder = tmp_path / "started"
    folder.mkdir()
    paths = os.pathsep.join(map(str, (*Path(__file__).parents[:2], Path.cwd())))
    command = [sys.executable, str(script), str(folder)]
    parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": paths})
    wait_until(lambda: all((folder / name).is_file() for name in ("one", "other")))
    workers = [int((folder / name).read_text()) for name in ("one", "other")]
    assert all(psutil.pid_exists(pid) for pid in workers)
    parent.send_signal(how)
    parent.wait()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers))


def test_when_all_fail_all_are_named(tmp_path):
    assert one_each(work, ("fails",), str(tmp_path)) == ["fails"]
