import numpy as np
import pytest

from cost_models.features import form_facts
from cost_models.machine import Machine
from cost_models.models import LearnedLatency
from cost_models.rivals import RIVALS
from cost_models.transfer import TransferredLatency, choose_rows, machine_on, resource_of
from kernels.workload import linear
from profiler.device import DeviceInfo

HERE = DeviceInfo(kind="cpu", name="here", isa="x avx512f avx2", threads=1, cores=4)
THERE = HERE.model_copy(update={"name": "there", "isa": "x avx2"})
SHAPES = [(64, 512), (512, 64), (128, 1024), (1024, 128), (320, 1280), (64, 64), (17, 900)]
WORKLOADS = [linear("shift_int8", m, k, n) for m in (1, 5, 23, 100, 401, 3000) for k, n in SHAPES]


def law_ms(workload, launch, compute, memory):
    """Row tiles of a core whose resources cost something else on the other device."""
    tiles = -(-workload.m // 7) * -(-workload.n // 32)
    return launch + compute * tiles * workload.k + memory * workload.traffic_bytes


def here_ms(workload):
    return law_ms(workload, 2e-3, 1e-6, 1e-8)


def there_ms(workload):
    return law_ms(workload, 6e-3, 4e-6, 1.5e-8)


@pytest.fixture(scope="module")
def source():
    model = LearnedLatency("shift_int8", "shift.dot", False, HERE)
    return model.fit(WORKLOADS, [here_ms(w) for w in WORKLOADS]).fitted_


def test_ten_rows_of_another_device_beat_what_they_give_alone(source):
    given = choose_rows(WORKLOADS, 10)
    rest = [w for i, w in enumerate(WORKLOADS) if i not in given]
    known = [WORKLOADS[i] for i in given]
    seen, truth = [there_ms(w) for w in known], np.array([there_ms(w) for w in rest])

    def error(model):
        return np.abs(model.fit(known, seen).predict(rest) / truth - 1).mean()

    found = error(TransferredLatency(source, THERE))
    assert found < 0.12
    # The law is nearly a roofline: that rival has it easy here.
    rivals = [error(RIVALS[name]()) for name in ("flops", "nearest")]
    assert all(found < 0.5 * other for other in rivals), (found, rivals)


def test_chosen_rows_are_spread_and_each_once():
    given = choose_rows(WORKLOADS, 10)
    assert len(set(given)) == 10
    tokens = {WORKLOADS[i].m for i in given}
    assert {1, 3000} <= tokens
    assert choose_rows(WORKLOADS[:3], 10) != [] and len(choose_rows(WORKLOADS[:3], 10)) == 3


def test_the_other_device_cuts_its_own_tiles(source):
    machine = machine_on(
        source.core.model_copy(update={"name": "panels"}), form_facts("mult_fp32"), THERE
    )
    assert isinstance(machine, Machine)
    assert machine.tile_rows == 6 and machine.units == 1


def test_resources():
    assert resource_of("launch") == "launch"
    assert resource_of("rows_memory") == "memory"
    assert resource_of("weights_l2") == resource_of("x_from_l3") == "caches"
    assert resource_of("row_steps") == "compute"


def test_three_rows_are_refused(source):
    with pytest.raises(ValueError, match="3 rows"):
        TransferredLatency(source, THERE).fit(WORKLOADS[:3], [1.0, 2.0, 3.0])
