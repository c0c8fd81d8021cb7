import pytest

from kernels.workload import attention, linear
from profiler.candidates import Candidate
from profiler.noise import measure_noise_floor, representatives
from profiler.ratios import noise_floor
from profiler.samples import Timing
from profiler.settings import Setting
from profiler.sweep_config import SweepConfig


def timing(*bursts_ms):
    latency_ms = bursts_ms[0] if bursts_ms else None
    return Timing(
        latency_ms=latency_ms,
        samples_kept=len(bursts_ms),
        samples_discarded=0,
        stop_reason="precision" if bursts_ms else "contended",
        reason=None if bursts_ms else "contended",
        bursts_ms=bursts_ms,
        rounds_ms=bursts_ms,
    )


class SimulatedSite:
    """Times by a script: primitive -> the bursts of both sides."""

    def __init__(self, script):
        self.script = script
        self.bound = []

    def bind(self, kernel, operands):
        self.bound.append(operands)
        return kernel

    def time(self, launches, settings, cache):
        (kernel,) = set(launches.values())
        return dict(zip(launches, self.script[kernel]))


CONFIG = SweepConfig(timing="quick", shapes=({"m": 1, "k": 1, "n": 1},))
SIZES = (8, 1, 64)
FOUND = [
    *[Candidate(linear("mult_fp32", m, 4, 4), "mult.panels", False, "mult") for m in SIZES],
    *[Candidate(linear("shift_int8", m, 4, 4), "shift.dot", False, "shift") for m in SIZES],
    Candidate(attention(1, 4, 8, 4)[0], "add.buckets", False, "add"),
    Candidate(linear("mult_fp32", 8, 4, 4), "torch.fp32", True, "torch"),
]


def test_one_kernel_of_ours_of_median_size_stands_for_each_primitive():
    chosen = representatives(FOUND)
    assert [c.kernel for c in chosen] == ["mult", "shift", "add"]
    assert [c.workload.m for c in chosen[:2]] == [8, 8]


def test_the_floor_is_the_largest_of_all_pairs_and_each_side_has_its_operands():
    pairs = {
        "mult": (timing(*[1.0] * 6), timing(*[1.01] * 6)),
        "shift": (timing(*[1.0] * 6), timing(1.0, 1.0, 1.0, 1.0, 1.0, 0.96)),
        "add": (timing(*[2.0] * 6), timing()),
    }
    site = SimulatedSite(pairs)
    floor = measure_noise_floor(FOUND, Setting(site, CONFIG, "simulated"))
    assert floor == pytest.approx(noise_floor(*pairs["shift"])) == pytest.approx(1 / 0.96 - 1)
    assert len(site.bound) == len({id(operands) for operands in site.bound}) == 6


def test_what_finds_no_memory_twice_is_no_pair():
    pairs = dict.fromkeys(("mult", "shift", "add"), (timing(*[1.0] * 6), timing(*[1.02] * 6)))
    site = SimulatedSite(pairs)
    bind = site.bind

    def bound(kernel, operands):
        if kernel == "shift" and len(site.bound) == 3:
            raise RuntimeError("CUDA out of memory")
        return bind(kernel, operands)

    site.bind = bound
    floor = measure_noise_floor(FOUND, Setting(site, CONFIG, "simulated"))
    assert floor == pytest.approx(noise_floor(*pairs["mult"])) and len(site.bound) == 5


def test_without_a_clean_pair_there_is_no_floor():
    contended = dict.fromkeys(("mult", "shift", "add"), (timing(), timing()))
    setting = Setting(SimulatedSite(contended), CONFIG, "simulated")
    assert measure_noise_floor(FOUND, setting) is None
    assert measure_noise_floor([], setting) is None
