import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models.features import (
    EXTENTS,
    Sizes,
    extents,
    form_facts,
    parallel_units,
    shape_group,
    sizes_of,
    traffic_bytes,
)
from cost_models.fitted_model import PhysicalCore
from cost_models.machine import Machine, machines, panel_rows
from cost_models.models import LearnedLatency, fit_core
from cost_models.physical_core import CORES, amx_tasks, cores_for
from cost_models.rivals import FlopsProportional, NearestNeighbour, Roofline
from kernels.forms import FORMS
from kernels.lowerings import panel_gemm
from kernels.targets import cpu_target
from kernels.workload import Workload, linear
from profiler.device import DeviceInfo

CPU = DeviceInfo(kind="cpu", name="synthetic", threads=2, cores=8)
GPU = DeviceInfo(kind="cuda", name="synthetic", cores=132)
WORKLOADS = [
    linear("mult_fp32", m, k, n)
    for m in (49, 196, 784, 3136)
    for k, n in ((64, 512), (512, 64), (320, 1280), (1280, 320), (1024, 128))
]
size = st.integers(1, 5000)


def test_a_device_is_shared_by_its_threads_or_its_multiprocessors():
    assert parallel_units(CPU) == 2
    assert parallel_units(GPU) == 132


@given(st.sampled_from(sorted(FORMS)), size, size, size, size)
def test_work_and_traffic_are_those_of_the_workload(form, b, m, k, n):
    workload = Workload(b=1 if FORMS[form]["w_layout"] == "nk" else b, m=m, k=k, n=n, **FORMS[form])
    sizes = Sizes(workload.b, m, k, n)
    found = dict(zip(EXTENTS, extents(sizes, form_facts(form))))
    assert found["macs"] == workload.macs
    assert found["traffic_bytes"] == pytest.approx(workload.traffic_bytes, abs=4)


def test_a_group_is_the_widths_whatever_the_tokens():
    assert shape_group(linear("mult_fp32", 1, 64, 32)) == shape_group(
        linear("mult_fp32", 9, 64, 32)
    )
    assert shape_group(linear("mult_fp32", 1, 64, 32)) != shape_group(
        linear("mult_fp32", 1, 32, 64)
    )


@pytest.mark.parametrize(
    "chip, triple, isa",
    [
        ("znver4", None, "avx512f avx2"),
        ("x86-64-v4", None, "avx512f avx2"),
        ("x86-64-v3", None, "avx2"),
        ("x86-64-v2", None, "ssse3"),
        ("cortex-a72", "aarch64-linux-gnu", "asimd"),
    ],
)
def test_tile_rows_are_those_of_our_schedules(chip, triple, isa):
    device, target = CPU.model_copy(update={"isa": isa}), cpu_target(chip, triple)
    for form in (form for form, fields in FORMS.items() if fields["w_layout"] == "nk"):
        schedule = panel_gemm.default_schedule(linear(form, 9, 64, 64), target)
        assert panel_rows(device, form_facts(form)) == schedule["tile_rows"]


def test_executed_work_counts_overhanging_tiles_and_idle_units():
    facts = form_facts("mult_fp32")

    def executed(tile, units):
        terms = CORES["tiles"](Sizes(1, 33, 10, 32), facts, Machine(units, *tile))
        return terms["macs"] * units

    assert executed((1, 1), 1) == 33 * 10 * 32
    assert executed((32, 32), 1) == 64 * 32 * 10
    assert executed((32, 32), 3) == 96 * 32 * 10


def test_rows_are_counted_as_whole_tiles_and_the_blocks_that_are_left():
    facts, machine = form_facts("mult_fp32"), Machine(tile_rows=7)
    terms = CORES["panels"](Sizes(1, 7 * 3 + 5, 10, 33), facts, machine)
    # 33 outputs are in three vectors: one and a half panels.
    assert terms["row_steps"] == 21 * 1.5 * 10
    assert (terms["steps_of_4"], terms["steps_of_2"], terms["steps_of_1"]) == (15, 0, 15)
    halves = CORES["panels"](Sizes(1, 7 * 4, 10, 64), facts, Machine(units=2, tile_rows=7))
    assert halves["row_steps"] == 28 * 2 * 10 / 2


def test_what_is_touched_in_turns_misses_a_cache_all_at_once():
    facts, machine = form_facts("add_attention_pm1"), Machine(l3_bytes=2**20)

    def missed(tokens):
        sizes = Sizes(1, tokens, 32, 32)
        terms = CORES["groups"](sizes, facts, machine)
        return terms["streamed_memory"] / traffic_bytes(sizes, facts)

    # Queries, keys, values and result: 512 bytes of each token.
    assert missed(2**11 * 0.75) == 0 and missed(2**11 * 1.5) == 1
    assert 0 < missed(2**11) < 0.5


def test_the_first_bytes_of_a_token_are_not_waited_for():
    facts, machine = form_facts("add_attention_pm1"), Machine(l3_bytes=1)
    terms = CORES["groups"](Sizes(2, 100, 32, 32), facts, machine)
    assert terms["waited_memory"] == 200 * (512 - 128)
    assert CORES["groups"](Sizes(2, 100, 4, 4), facts, machine)["waited_memory"] == 0


def test_half_panels_are_counted():
    facts, machine = form_facts("mult_bf16"), Machine(tile_rows=7)
    whole, half = (CORES["panels"](Sizes(1, 14, 64, n), facts, machine) for n in (64, 48))
    assert (whole["half_steps"], half["half_steps"]) == (0, 14 * 32 / 2)
    assert half["row_steps"] == whole["row_steps"] * 3 / 4


def test_amx_is_counted_in_its_tiles_blocks_and_tasks():
    device = CPU.model_copy(update={"isa": "amx_int8 avx512f", "threads": 1})
    facts = form_facts("shift_int4")
    core, _ = cores_for("shift.amx_nibbles", facts, False, device)
    machine = machines(core, facts, device)[0]
    terms = CORES["amx"](Sizes(1, 128 + 17, 65, 70), facts, machine)
    # 10 tiles of rows, 3 panels, k in two pieces; 5 blocks a panel, 2 tasks a group of panels.
    assert (core, terms["products"], terms["blocks"], terms["tasks"]) == ("amx", 60, 15, 4)
    assert terms["decoded"] == 2 * 3 * 65
    assert "decoded" not in CORES[core](Sizes(1, 9, 65, 70), form_facts("shift_int8"), machine)
    assert cores_for("shift.nibbles", facts, False, device)[0] == "panels"


@pytest.mark.parametrize("form", ["mult_int8", "mult_bf16", "shift_int8", "shift_int4"])
def test_tasks_of_amx_are_those_of_our_schedule(form):
    facts = form_facts(form)
    for n in (16, 32, 64, 100, 256, 320, 1000, 4096):
        for k in (64, 500, 4096):
            workload = linear(form, 9, k, n)
            schedule = panel_gemm.amx_default_schedule(workload, cpu_target("sapphirerapids"))
            at_once, groups = panel_gemm.panel_groups(-(-n // 32), schedule["panels"])
            assert amx_tasks(n, workload.weight_bytes, facts) == (schedule["tile_rows"], groups)
            assert (groups - 1) * at_once < -(-n // 32) <= groups * at_once


@settings(max_examples=50)
@given(
    st.sampled_from(
        [
            ("panels", "shift_int8"),
            ("panels", "mult_fp32"),
            ("tiles", "mult_bf16"),
            ("amx", "shift_int4"),
            ("amx", "shift_int8"),
        ]
    ),
    st.integers(1, 500),
    st.integers(1, 500),
    size,
    size,
)
def test_no_count_falls_from_whole_tiles_to_more_of_them(core_and_form, few, more, k, n):
    core, form = core_and_form
    machine = Machine(tile_rows=7, tile_columns=32)
    rows = 128 if core == "amx" else 7
    less, greater = (
        CORES[core](Sizes(1, rows * tiles, k, n), form_facts(form), machine)
        for tiles in (few, few + more)
    )
    assert all(greater[term] >= less[term] * (1 - 1e-9) for term in less)


def test_costs_of_a_core_are_found_again():
    truth = PhysicalCore(
        name="panels",
        units=1,
        tile_rows=7,
        tile_columns=32,
        l2_bytes=2**20,
        l3_bytes=2**25,
        costs_ms={"launch": 1e-3, "row_steps": 5e-7, "tiles": 4e-5, "prepared": 1e-7},
    )
    workloads = [linear("shift_int8", w.m + i, w.k, w.n) for i, w in enumerate(WORKLOADS)]
    sizes, facts = sizes_of(workloads), form_facts("shift_int8")
    latency = truth.latency_ms(sizes, facts)
    found = fit_core("panels", truth.machine, sizes, facts, latency)
    other = Sizes(1.0, 333.0, 200.0, 700.0)
    assert found.latency_ms(other, facts) == pytest.approx(truth.latency_ms(other, facts), rel=0.01)


def test_one_prediction_is_one_of_many(law):
    model = LearnedLatency("mult_fp32", "x", False, CPU)
    model.fit(WORKLOADS, [law(w) for w in WORKLOADS])
    asked = [linear("mult_fp32", m, k, 300) for m in (1, 100, 9000) for k in (7, 400)]
    many = model.fitted_.predict_many(asked)
    for i, workload in enumerate(asked):
        one = model.fitted_.predict(workload)
        assert one.latency_ms == pytest.approx(many.latency_ms[i])
        assert one.low_ms == pytest.approx(many.low_ms[i])
        assert one.octaves_outside == pytest.approx(many.octaves_outside[i])


def test_work_alone_and_its_rate():
    model = FlopsProportional().fit(WORKLOADS, [w.macs / 5e6 for w in WORKLOADS])
    assert model.predict(WORKLOADS[:1])[0] == pytest.approx(WORKLOADS[0].macs / 5e6)


def test_roofline_finds_the_parameters_of_a_roofline():
    launch, macs_rate, bytes_rate = 0.01, 2e8, 1e7
    latency = [launch + max(w.macs / macs_rate, w.traffic_bytes / bytes_rate) for w in WORKLOADS]
    found = Roofline().fit(WORKLOADS, latency)
    assert found.launch_ms_ == pytest.approx(launch, rel=0.2)
    assert found.macs_per_ms_ == pytest.approx(macs_rate, rel=0.2)
    assert found.bytes_per_ms_ == pytest.approx(bytes_rate, rel=0.2)


def test_nearest_neighbour_scales_by_the_work():
    known = [linear("mult_fp32", 100, 64, 64), linear("mult_fp32", 5000, 64, 64)]
    model = NearestNeighbour().fit(known, [1.0, 7.0])
    asked = [linear("mult_fp32", 200, 64, 64), linear("mult_fp32", 5000, 32, 64)]
    assert model.predict(asked) == pytest.approx([2.0, 3.5])


def wave_law(workload):
    """A GPU that works through 128 × 64 tiles in waves."""
    tiles = -(-workload.m // 128) * -(-workload.n // 64)
    return 0.003 + -(-tiles // 132) * 128 * 64 * workload.k / 2e8


def test_the_learned_model_follows_waves_that_a_roofline_cannot():
    train, test = WORKLOADS[::2] + WORKLOADS[1::4], WORKLOADS[3::4]
    latency = [wave_law(w) for w in train]
    truth = np.array([wave_law(w) for w in test])

    def error(model):
        return np.abs(model.fit(train, latency).predict(test) / truth - 1).mean()

    learned = error(LearnedLatency("mult_fp32", "x", False, GPU))
    assert learned < 0.5 * error(Roofline())
    assert learned < 0.5 * error(NearestNeighbour())


def test_the_learned_model_refuses_three_rows():
    with pytest.raises(ValueError, match="3 rows"):
        LearnedLatency("mult_fp32", "x", False, CPU).fit(WORKLOADS[:3], [1.0, 2.0, 3.0])


def test_noisy_rows_give_wider_intervals(law):
    def width(workloads, latency):
        model = LearnedLatency("mult_fp32", "x", False, CPU).fit(workloads, latency)
        found = model.predict_interval([linear("mult_fp32", 400, 512, 64)])
        assert found.low_ms[0] < found.latency_ms[0] < found.high_ms[0]
        return found.high_ms[0] / found.low_ms[0]

    exact = [law(w) for w in WORKLOADS]
    shaken = [t * (1.3 if i % 2 else 0.8) for i, t in enumerate(exact)]
    assert width(WORKLOADS, shaken) > 1.2 * width(WORKLOADS, exact)


def test_energy_is_fitted_by_the_same_estimator():
    energy_mj = [w.macs * 4e-9 + w.traffic_bytes * 1e-7 for w in WORKLOADS]
    model = LearnedLatency("mult_fp32", "x", False, CPU).fit(WORKLOADS, energy_mj)
    asked = linear("mult_fp32", 500, 400, 400)
    expected = asked.macs * 4e-9 + asked.traffic_bytes * 1e-7
    assert model.predict([asked])[0] == pytest.approx(expected, rel=0.1)


def test_the_same_seed_gives_the_same_model(law):
    latency = [law(w) for w in WORKLOADS]
    one, two = (
        LearnedLatency("mult_fp32", "x", False, CPU, seed=3).fit(WORKLOADS, latency).fitted_
        for _ in range(2)
    )
    assert one == two
