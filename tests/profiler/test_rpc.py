"""A device behind TVM's RPC tracker, here this machine over loopback."""

import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from tvm.rpc import connect_tracker
from tvm.target import codegen
from waiting import wait_until

from kernels.build import build
from kernels.reference import max_abs_error, random_operands
from kernels.remote import RemoteError, connect
from kernels.workload import attention, linear
from profiler import sweep
from profiler.command_line import run
from profiler.device import DeviceError
from profiler.rpc import measure_remote, remote_site
from profiler.samples import PRESETS, TimingSettings
from profiler.store import open_store

pytest.importorskip("tornado", reason="TVM's tracker needs tornado: pip install -e '.[rpc]'")

KEY = "loopback"
SHORT = TimingSettings(
    sample_ms=0.05,
    rest_ms=0,
    warmup_ms=0,
    warmup_max_ms=0.1,
    burst_ms=0.2,
    rounds_min=6,
    max_time_s=0.01,
)
TOML = """
timing = "quick"
energy = true
forms = ["mult_fp32", "shift_int8"]
[[shapes]]
m = 20
k = 16
n = 32
[[shapes]]
kind = "attention"
b = 2
tokens = 10
bits = 8
n = 8
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def tracker():
    """Address of a tracker that knows one server."""
    port, server_port = free_port(), free_port()
    address = f"127.0.0.1:{port}"

    def listed():
        try:
            session = connect_tracker("127.0.0.1", port)
        except (OSError, RuntimeError):
            return False
        return bool(session.summary()["server_info"])

    ports = ["--port", str(port), "--port-end", str(port + 1)]
    commands = {
        "rpc_tracker": ["--host", "127.0.0.1", *ports],
        "rpc_server": [
            *("--host", "127.0.0.1", "--tracker", address, "--key", KEY),
            *("--port", str(server_port), "--port-end", str(server_port + 9)),
        ],
    }
    processes = []
    try:
        for name, options in commands.items():
            if processes:
                wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"tvm.exec.{name}", *options],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )
        wait_until(listed)
        yield address
    finally:
        for process in reversed(processes):
            # With the workers that each of them has started.
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def test_a_sweep_of_a_remote_device_has_its_figures_and_no_energy(
    tracker, tmp_path, monkeypatch, capfd
):
    monkeypatch.setitem(PRESETS, "quick", SHORT)
    (tmp_path / "tiny.toml").write_text(TOML)
    arguments = ["--config", str(tmp_path / "tiny.toml"), "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["sweep", *arguments, "--rpc", tracker, "--key", KEY])
    with pytest.raises(SystemExit) as exit_:
        run(sweep.app)
    assert exit_.value.code == 0, capfd.readouterr().err
    store = open_store(tmp_path / "measurements.sqlite")
    rows = list(store.rows(samples=True))
    store.close()
    assert {row.workload.kind for row in rows} == {"linear", "kv", "qkv", "attention"}
    for row in rows:
        assert row.status == "ok" and row.latency_ms == pytest.approx(np.median(row.samples_ms))
        assert len(row.bursts_ms) >= SHORT.rounds_min
        assert row.energy_mj is None and row.energy_reason.startswith("RPC")
        assert not row.is_baseline
        chip = codegen.llvm_get_system_cpu()
        assert row.device.name == f"{chip}, RPC key {KEY}" and row.device.isa.endswith(chip)
        assert row.device.threads == 1
    assert all(row.noise_floor is not None for row in rows)


def test_the_device_is_known_by_its_chip_its_key_and_its_threads(tracker):
    one, two = (remote_site(tracker, KEY, threads).device for threads in (1, 2))
    elsewhere = one.model_copy(update={"name": one.name.replace(KEY, "other")})
    assert len({device.fingerprint for device in (one, two, elsewhere)}) == 3
    assert one.fingerprint == remote_site(tracker, KEY, 1).device.fingerprint


def test_figures_are_of_the_kernel_and_not_of_the_network(tracker):
    remote = connect(tracker, KEY, threads=1)
    remote.prepare()
    small, large = linear("mult_fp32", 4, 16, 32), linear("mult_fp32", 1024, 256, 256)
    calls = {}
    for workload in (small, large):
        kernel = remote.build(workload, "mult.panels")
        operands = random_operands(workload, seed=1)
        assert max_abs_error(workload, operands, remote.run(kernel, operands))[1]
        calls[workload] = remote.bind(kernel, operands)
    timings = measure_remote(calls, SHORT)
    # A round trip costs some 100 µs even over loopback; the small product some 100 ns.
    assert timings[small].latency_ms < 0.05 < timings[large].latency_ms
    cold = measure_remote({small: calls[small]}, SHORT, flush_bytes=2**22)
    assert cold[small].details["launches_per_sample"] == 1


def test_the_same_kernel_there_and_here(tracker):
    remote = connect(tracker, KEY, threads=1)
    workload = attention(2, 12, 8, 8)[0]
    operands = random_operands(workload, seed=2)
    there = remote.run(remote.build(workload, "add.buckets"), operands)
    assert (there == build(workload, "add.buckets")(operands)).all()


def test_a_device_that_is_not_there_is_named_with_those_that_are(tracker):
    with pytest.raises(RemoteError, match=f"nope: {tracker} has {KEY}"):
        connect(tracker, "nope", threads=1)
    with pytest.raises(DeviceError, match="--rpc nope"):
        remote_site(tracker, "nope", 1)


def test_another_architecture_gets_objects_to_link_itself(tracker):
    remote = connect(tracker, KEY, 1, chip="cortex-a72", triple="aarch64-linux-gnu")
    assert remote.architecture == "aarch64" and remote.target.vector_bits == 128
    # This machine is none, so that its linker refuses what was sent.
    with pytest.raises(RuntimeError, match=r"\.tar"):
        remote.build(linear("mult_fp32", 4, 16, 32), "mult.panels")
