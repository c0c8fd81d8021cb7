import math

import numpy as np
import pytest

from cost_models.features import executed_macs, parallel_units
from cost_models.models import LearnedLatency, NearestNeighbour, Roofline
from kernels.workload import linear
from profiler.device import DeviceInfo

CPU = DeviceInfo(kind="cpu", name="synthetic", threads=2, cores=8)
GPU = DeviceInfo(kind="cuda", name="synthetic", cores=132)
WORKLOADS = [
    linear("mult_fp32", m, k, n)
    for m in (49, 196, 784, 3136)
    for k, n in ((64, 512), (512, 64), (320, 1280), (1280, 320), (1024, 128))
]


def test_a_device_is_shared_by_its_threads_or_its_multiprocessors():
    assert parallel_units(CPU) == 2
    assert parallel_units(GPU) == 132


def test_executed_work_counts_overhanging_tiles_and_idle_units():
    workload = linear("mult_fp32", 33, 10, 32)
    assert executed_macs(workload, (1, 1), 1) == workload.macs
    assert executed_macs(workload, (32, 32), 1) == 64 * 32 * 10
    assert executed_macs(workload, (32, 32), 3) == 96 * 32 * 10


def test_roofline_finds_the_parameters_of_a_roofline():
    launch, macs_rate, bytes_rate = 0.01, 2e8, 1e7
    latency = [launch + max(w.macs / macs_rate, w.traffic_bytes / bytes_rate) for w in WORKLOADS]
    found = Roofline().fit(WORKLOADS, latency).parameters_
    assert found.launch_ms == pytest.approx(launch, rel=0.2)
    assert found.macs_per_ms == pytest.approx(macs_rate, rel=0.2)
    assert found.bytes_per_ms == pytest.approx(bytes_rate, rel=0.2)


def test_nearest_neighbour_scales_by_the_work():
    known = [linear("mult_fp32", 100, 64, 64), linear("mult_fp32", 5000, 64, 64)]
    model = NearestNeighbour().fit(known, [1.0, 7.0])
    assert model.predict([linear("mult_fp32", 200, 64, 64)])[0].latency_ms == pytest.approx(2.0)
    assert model.predict([linear("mult_fp32", 5000, 32, 64)])[0].latency_ms == pytest.approx(3.5)


def wave_law(workload):
    """A GPU that works through 96 × 80 tiles in waves: none of the tiles that models try."""
    tiles = math.ceil(workload.m / 96) * math.ceil(workload.n / 80)
    return 0.003 + math.ceil(tiles / 132) * 96 * 80 * workload.k / 2e8


def test_the_learned_model_follows_waves_that_a_roofline_cannot():
    train, test = WORKLOADS[::2] + WORKLOADS[1::4], WORKLOADS[3::4]
    latency = [wave_law(w) for w in train]
    truth = np.array([wave_law(w) for w in test])

    def error(model):
        predicted = [p.latency_ms for p in model.fit(train, latency).predict(test)]
        return np.abs(np.array(predicted) / truth - 1).mean()

    learned = error(LearnedLatency("mult_fp32", "x", False, GPU))
    assert learned < 0.5 * error(Roofline())
    assert learned < 0.5 * error(NearestNeighbour())


def test_the_learned_model_refuses_three_rows():
    with pytest.raises(ValueError, match="3 rows"):
        LearnedLatency("mult_fp32", "x", False, CPU).fit(WORKLOADS[:3], [1.0, 2.0, 3.0])


def test_few_or_noisy_rows_give_wider_intervals(law):
    def width(workloads, latency):
        model = LearnedLatency("mult_fp32", "x", False, CPU).fit(workloads, latency)
        prediction = model.predict([linear("mult_fp32", 400, 512, 64)])[0]
        assert prediction.low_ms < prediction.latency_ms < prediction.high_ms
        return prediction.high_ms / prediction.low_ms

    exact = [law(w) for w in WORKLOADS]
    shaken = [t * (1.3 if i % 2 else 0.8) for i, t in enumerate(exact)]
    assert width(WORKLOADS, shaken) > 1.2 * width(WORKLOADS, exact)
    assert width(WORKLOADS[::4], exact[::4]) > width(WORKLOADS, exact)


def test_the_same_seed_gives_the_same_model(law):
    latency = [law(w) for w in WORKLOADS]
    one, two = (
        LearnedLatency("mult_fp32", "x", False, CPU, seed=3).fit(WORKLOADS, latency).fitted_
        for _ in range(2)
    )
    assert one == two
