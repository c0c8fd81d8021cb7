"""Processes of their own, on simulated devices: what matters is who waits for whom."""

import json
import os
import time
from pathlib import Path

import pytest

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


def test_when_all_fail_all_are_named(tmp_path):
    assert one_each(work, ("fails",), str(tmp_path)) == ["fails"]
