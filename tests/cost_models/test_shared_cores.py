"""Rows of a shared core: a hint where there are few others, and never of held-out widths."""

import math
import random

import numpy as np
import pytest

import cost_models.held_out as held_out_module
from cost_models.features import shape_group
from cost_models.held_out import is_locked, validate
from cost_models.models import LearnedLatency
from cost_models.priors import extrapolate_by_
from cost_models.shared_cores import learn_from_shared_
from cost_models.training_rows import Row
from kernels.workload import linear
from profiler.device import DeviceInfo

DEVICE = DeviceInfo(kind="cpu", name="here", isa="x avx2", threads=1, cores=2)
WIDTHS = [(k, n) for k in (32, 80, 200, 500, 1200) for n in (16, 64, 200, 800)]
EVERY = [linear("shift_int8", m, k, n) for k, n in WIDTHS for m in (3, 40, 500, 6000)]
rng = random.Random(1)
FEW = rng.sample([w for w in EVERY if w.m < 100], 14)
OTHERS = [w for w in EVERY if w not in FEW]


def _arithmetic(workload):
    """Tiles, and what no core counts: few rows do not show it, many do, wherever they are from."""
    tiles = -(-workload.m // 2) * -(-workload.n // 32)
    return tiles * workload.k * (1.2 + 0.2 * math.sin(math.log2(workload.k * workload.n)))


def whole_ms(workload):
    return 2e-3 + 1e-6 * _arithmetic(workload) + 1e-8 * workload.traffic_bytes


def shared_ms(workload):
    """A neighbour halves the speed of arithmetic, and the rest is as it was."""
    return 3e-3 + 2e-6 * _arithmetic(workload) + 1e-8 * workload.traffic_bytes


@pytest.fixture
def rows(measure):
    def made(workloads, law, shared):
        details = {"own_core": not shared}
        return [
            Row(w, law(w), 0.99 * law(w), 1.01 * law(w), measure(w, law(w), details=details))
            for w in workloads
        ]

    return made


def fitted(workloads):
    model = LearnedLatency("shift_int8", "shift.dot", False, DEVICE)
    return model.fit(workloads, [whole_ms(w) for w in workloads])


def error(model, workloads):
    truth = np.array([whole_ms(w) for w in workloads])
    return float(np.abs(model.predict(workloads) / truth - 1).mean())


def test_a_few_rows_of_the_whole_core_and_many_of_a_shared_one(rows):
    model, seen = fitted(FEW), [whole_ms(w) for w in FEW]
    before = error(model, OTHERS)
    assert learn_from_shared_(model, FEW, seen, rows(OTHERS, shared_ms, True))
    assert error(model, OTHERS) < min(0.08, 0.5 * before)
    # What a shared core was measured at is inside of what is known; its figures are not believed.
    assert not model.fitted_.predict_many(OTHERS).octaves_outside.any()
    assert model.fitted_.foreign_rows == len(OTHERS)


def test_what_was_learned_so_is_set_against_other_devices_too(rows):
    """A device that is like this one, and one of another law."""
    for law, is_like in ((lambda w: 3 * whole_ms(w), True), (lambda w: 1e-9 * w.m**3, False)):
        model, seen = fitted(FEW), [whole_ms(w) for w in FEW]
        assert learn_from_shared_(model, FEW, seen, rows(OTHERS, shared_ms, True))
        there = LearnedLatency("shift_int8", "shift.dot", False, DEVICE)
        there.fit(EVERY, [law(w) for w in EVERY])
        chosen = extrapolate_by_(model, FEW, seen, {"there": there.fitted_})
        assert error(model, OTHERS) < 0.08
        assert is_like or chosen is None


def test_what_has_nothing_to_do_with_the_kernel_is_not_learned(rows):
    def noise(workload):
        return random.Random(workload.key).uniform(0.01, 10)

    many = rng.sample(EVERY, 30)
    model = fitted(many)
    known = model.fitted_
    hints = rows([w for w in EVERY if w not in many], noise, True)
    assert not learn_from_shared_(model, many, [whole_ms(w) for w in many], hints)
    assert model.fitted_ is known


def test_what_is_fewer_than_the_rest_is_not_asked(rows):
    model, seen = fitted(FEW), [whole_ms(w) for w in FEW]
    known = model.fitted_
    hints = rows(OTHERS, shared_ms, True)
    assert not learn_from_shared_(model, FEW, seen, hints[:19])
    more = rng.sample(EVERY, 41)
    fewer = rows([w for w in EVERY if w not in more], shared_ms, True)
    assert not learn_from_shared_(model, more, [whole_ms(w) for w in more], fewer)
    assert model.fitted_ is known


def test_nothing_of_held_out_widths_is_learned(rows, monkeypatch):
    told = []

    def spy(model, workloads, latency_ms, shared):
        told.extend(row.workload for row in shared)
        return learn_from_shared_(model, workloads, latency_ms, shared)

    monkeypatch.setattr(held_out_module, "learn_from_shared_", spy)
    model = LearnedLatency("shift_int8", "shift.dot", False, DEVICE)
    found = validate(model, rows(FEW, whole_ms, False), rows(OTHERS, shared_ms, True))
    tested = {point.label for point in found.points if point.split == "test"}
    groups = {shape_group(w) for w in FEW if w.label in tested}
    assert told and not any(is_locked(w) or shape_group(w) in groups for w in told)
    assert found.rows_shared == len(OTHERS) and found.learned_from_shared
    assert found.rows_train + found.rows_test == len(FEW)
