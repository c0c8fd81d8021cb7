"""Synthetic devices whose law of latency is known."""

import math
import random

import pytest

from cost_models.fit import fit
from kernels.workload import attention, linear
from profiler.device import DeviceInfo
from profiler.store import Measurement, create_store

SHAPES = [(64, 512), (512, 64), (128, 1024), (1024, 128), (320, 1280), (1280, 320), (64, 64)]
TOKENS = (49, 100, 196, 400, 784, 3136)
CPU = DeviceInfo(kind="cpu", name="synthetic", isa="x", threads=1, cores=4)


def law_ms(workload, rate=1.0):
    """Launch + max(tile-quantised work, traffic) of a slow core."""
    padded = math.ceil(workload.m / 32) * 32 * math.ceil(workload.n / 32) * 32
    work = workload.b * padded * workload.k / (2e7 * rate)
    return 0.004 + max(work, workload.traffic_bytes / 1e7)


def measurement(workload, latency_ms, lowering="shift.tiled", device=CPU, **fields):
    values = {
        "workload": workload,
        "subject": workload.label if workload else "layer",
        "device": device,
        "lowering": lowering,
        "latency_ms": latency_ms,
        "latency_low_ms": latency_ms and latency_ms * 0.99,
        "latency_high_ms": latency_ms and latency_ms * 1.01,
        "energy_reason": "no counter on this machine",
        "weight_bytes": workload.weight_bytes if workload else None,
    }
    return Measurement(**(values | fields))


def noisy(workload, seed=0, rate=1.0):
    noise = random.Random(f"{seed}{workload.key}{rate}").gauss(0, 0.02)
    return law_ms(workload, rate) * math.exp(noise)


@pytest.fixture(scope="session")
def measure():
    return measurement


@pytest.fixture(scope="session")
def law():
    return law_ms


@pytest.fixture(scope="session")
def sweep():
    """Rows of a plausible sweep: two lowerings, a baseline, attention, a short group, a failure."""
    linears = [linear("shift_int8", m, k, n) for m in TOKENS for k, n in SHAPES]
    rows = [measurement(w, noisy(w)) for w in linears]
    rows += [measurement(w, noisy(w, rate=0.5), "shift.simple") for w in linears[::3]]
    baseline = [linear("mult_fp32", m, k, n) for m in TOKENS for k, n in SHAPES]
    rows += [
        measurement(w, noisy(w, rate=2.0), "torch.fp32", is_baseline=True) for w in baseline[::2]
    ]
    products = [attention(b, tokens, 16, 32)[1] for b in (1, 2, 5, 8, 32) for tokens in TOKENS]
    rows += [measurement(w, noisy(w), "add.rows") for w in products]
    rows += [measurement(w, noisy(w), "mult.tiled") for w in baseline[:2]]
    rows.append(
        measurement(
            linear("mult_bf16", 49, 64, 64),
            None,
            "mult.bf16",
            status="failed",
            reason="no such instruction",
        )
    )
    return rows


@pytest.fixture
def store(tmp_path, sweep):
    """A store file with the sweep."""
    path = tmp_path / "measurements.sqlite"
    opened = create_store(path)
    for row in sweep:
        opened.put(row)
    opened.close()
    return path


@pytest.fixture(scope="session")
def fitted(sweep):
    """Table and held-out errors of the sweep."""
    return fit(sweep, "measurements.sqlite")


@pytest.fixture(scope="session")
def table(fitted):
    return fitted[0]
