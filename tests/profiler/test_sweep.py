"""Sweeps end to end: what is written, what a second one leaves alone, what is refused."""

import multiprocessing
from dataclasses import replace
from statistics import median

import pytest
from short_sweeps import SHORT

from kernels.reference import random_operands
from kernels.workload import linear
from profiler import candidates, sites, sweep
from profiler.clock import clock_rate
from profiler.command_line import run
from profiler.device import DeviceInfo
from profiler.energy import EnergyReading
from profiler.model_workloads import ModelError
from profiler.samples import PRESETS
from profiler.settings import settings_for
from profiler.store import create_store, open_store
from profiler.sweep_config import SweepConfig

pytestmark = pytest.mark.usefixtures("quick_and_undisturbed")

TOML = """
timing = "quick"
forms = ["mult_fp32", "mult_int8", "shift_int8"]
threads = [1]
[[shapes]]
m = 20
k = 16
n = 32
[[shapes]]
kind = "attention"
b = 1
tokens = 10
bits = 8
n = 8
"""
CONFIG = SweepConfig(
    timing="quick",
    forms=("mult_fp32", "mult_int8", "shift_int8"),
    shapes=({"m": 20, "k": 16, "n": 32},),
)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command in an empty folder: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TOML)

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["sweep", *arguments])
        with pytest.raises(SystemExit) as exit_:
            run(sweep.app, (ModelError,))
        return exit_.value.code, *capsys.readouterr()

    return call


def rows_of(path):
    store = open_store(path)
    rows = list(store.rows(samples=True))
    store.close()
    return rows


def test_each_row_has_its_figures_its_samples_and_the_sweeps_noise_floor(command, tmp_path):
    code, out, _ = command("--config", "tiny.toml", "--out", "run")
    assert code == 0
    rows = rows_of(tmp_path / "run" / "measurements.sqlite")
    (setting,) = settings_for(SweepConfig.model_validate(CONFIG), "tiny", "cpu", "1")
    for workload in setting.config.workloads:
        found = {row.lowering for row in rows if row.workload == workload}
        assert found == {name for name, _ in setting.site.kernels(workload, False)}
    assert {row.workload.kind for row in rows} == {"linear", "kv", "qkv", "attention"}
    for row in rows:
        assert row.status == "ok"
        assert row.latency_ms == pytest.approx(median(row.samples_ms))
        assert len(row.samples_ms) == row.samples_kept and len(row.bursts_ms) >= SHORT.rounds_min
    (floor,) = {row.noise_floor for row in rows}
    assert floor > 0
    lost = {row.workload.form: row.relative_error for row in rows}
    assert lost["mult_fp32"] < 1e-5 < lost["mult_int8"] < 0.02 < 0.05 < lost["shift_int8"] < 0.5
    assert lost["add_kv_pm1"] is None
    assert f"noise floor: {floor:.1%}" in out
    # Of several lowerings of a form it is that of the fastest.
    errors = [row.relative_error for row in rows if row.workload.form == "shift_int8"]
    assert "shift's error" in out.lower() and any(f"{error:.1%}" in out for error in errors)
    assert f"{len(rows)} rows measured" in out and "harness" in out


def test_a_shift_is_set_against_our_own_mults_of_its_width(command, tmp_path):
    forms = 'forms = ["mult_fp32", "mult_int8", "mult_int7", "shift_int8", "shift_fp32"]'
    own = TOML.replace('forms = ["mult_fp32", "mult_int8", "shift_int8"]', forms)
    (tmp_path / "own.toml").write_text(own)
    _, out, _ = command("--config", "own.toml", "--store", "a.sqlite")
    against = {"shift_int8": {"int8", "int7"}, "shift_fp32": {"fp32"}}
    for row in rows_of(tmp_path / "a.sqlite"):
        labels = [name for name in row.details if name.endswith("_mult")]
        expected = set() if row.is_baseline else against.get(row.workload.form, set())
        assert {label.split("_")[2] for label in labels} == expected
        for label in labels:
            low, ratio, high = (row.details[label + end] for end in ("_low", "", "_high"))
            assert 0 < low <= ratio <= high
    assert "our own mult, int8" in out and "our own mult, int7" in out


def test_a_second_sweep_measures_only_the_product_that_lacks_a_figure(command, tmp_path):
    command("--config", "tiny.toml", "--store", "a.sqlite")
    first = rows_of(tmp_path / "a.sqlite")
    store = open_store(tmp_path / "a.sqlite")
    contended = {"status": "contended", "latency_ms": None, "reason": "a neighbour"}
    store.put(first[0].model_copy(update=contended))
    store.close()
    code, out, _ = command("--config", "tiny.toml", "--store", "a.sqlite")
    second = rows_of(tmp_path / "a.sqlite")
    assert code == 0 and "1 rows measured" in out
    assert {row.key for row in second} == {row.key for row in first}
    assert all(row.status == "ok" for row in second)
    product = first[0].workload.product
    before, after = (
        [row for row in rows if row.workload.product != product] for rows in (first, second)
    )
    assert before and after == before


def test_hot_and_cold_are_rows_of_their_own(tmp_path):
    (setting,) = settings_for(
        CONFIG.model_copy(update={"forms": ("mult_fp32",), "cache": ("hot", "cold")}),
        "both",
        "cpu",
        "1",
    )
    store = create_store(tmp_path / "a.sqlite")
    rows = sweep.sweep(setting, store)
    store.close()
    assert sorted(row.cache for row in rows) == ["cold", "cold", "hot", "hot"]


def test_what_is_wrong_or_fails_is_never_timed_and_says_why(monkeypatch, tmp_path):
    timed = []
    build, time = sites.LocalSite.build, sites.LocalSite.time

    def broken(site, workload, lowering, is_baseline):
        kernel = build(site, workload, lowering, is_baseline)
        if lowering == "mult.panels":
            return replace(kernel, launch=lambda *arguments: arguments[-1].zero_())
        if lowering == "shift.dot":
            raise RuntimeError("LLVM has no\nsuch instruction")
        return kernel

    def noted(site, launches, settings, cache):
        timed.extend(launches)
        return time(site, launches, settings, cache)

    monkeypatch.setattr(sites.LocalSite, "build", broken)
    monkeypatch.setattr(sites.LocalSite, "time", noted)
    (setting,) = settings_for(CONFIG, "broken", "cpu", "1")
    store = create_store(tmp_path / "a.sqlite")
    rows = {row.lowering: row for row in sweep.sweep(setting, store)}
    store.close()
    assert rows["mult.panels"].reason.startswith("wrong: off by")
    assert rows["shift.dot"].reason == "build: RuntimeError: such instruction"
    assert rows["mult.dot"].status == "ok"
    assert not [name for name in timed if "mult.panels" in name or "shift.dot" in name]


def test_operands_too_large_for_memory_are_a_reason(monkeypatch, tmp_path):
    def random(workload, seed=0):
        if workload.form == "mult_int8":
            raise MemoryError("2 TiB")
        return random_operands(workload, seed)

    monkeypatch.setattr(candidates, "random_operands", random)
    (setting,) = settings_for(CONFIG, "large", "cpu", "1")
    store = create_store(tmp_path / "a.sqlite")
    rows = {row.lowering: row for row in sweep.sweep(setting, store)}
    store.close()
    assert rows["mult.dot"].reason == "launch: MemoryError: 2 TiB"
    assert rows["mult.panels"].status == "ok"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--device", "all"], "--device all: no GPU"),
        (["--device", "cuda:x"], "--device cuda:x"),
        (["--device", "cuda:0"], "--device cuda:0"),
        (["--device", "cudax"], "--device cudax"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda:0", "--threads", "1"], "--threads 1"),
        (["--threads", "1,two"], "--threads 1,two"),
        (["--threads", "0"], "--threads"),
        (["--threads", "100000"], "--threads"),
        (["--rpc", "localhost:9190"], "--key"),
        (["--key", "rasp5"], "--rpc"),
        (["--rpc", "nowhere", "--key", "rasp5"], "nowhere: must be HOST:PORT"),
        (["--rpc", "127.0.0.1:1", "--key", "rasp5"], "127.0.0.1:1: is no RPC tracker"),
        (["--rpc", "127.0.0.1:99999", "--key", "rasp5"], "127.0.0.1:99999"),
        (["--rpc", "127.0.0.1:1", "--key", "rasp5", "--device", "cuda:0"], "--device cuda:0"),
        (["--rpc", "127.0.0.1:1", "--key", "rasp5", "--isa", "avx2"], "--isa avx2"),
        (["--batch", "8"], "--batch 8: applies to --model"),
        (["--out", "run", "--store", "a.sqlite"], "--out and --store"),
        (["--model", "no_such_net"], "no_such_net"),
        (["--model", "pvt_v2_b0", "--config", "pvt"], "--config and --model"),
        (["--store", "sqlite:///no/such/folder/a.sqlite"], "no/such/folder"),
        (["--store", "nosuchdatabase://a"], "nosuchdatabase"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, monkeypatch, arguments, named):
    monkeypatch.setattr("profiler.nvml.gpu_count", lambda: 0)
    code, out, errors = command(*arguments)
    assert (code, out) == (2, "")
    assert named in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_gpu_that_no_kernel_can_be_built_for_is_bad_input(command, monkeypatch):
    blackwell = DeviceInfo(kind="cuda", name="Simulated", uuid="GPU-1", isa="sm_100")
    monkeypatch.setattr("profiler.nvml.cuda_info", lambda index: blackwell)
    code, out, errors = command("--config", "tiny.toml", "--device", "cuda:1")
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: --device cuda:1: ") and "sm_100" in errors


@pytest.mark.parametrize(("failed", "code"), [([], 0), (["cuda:1"], 1)])
def test_all_gpus_get_a_worker_each_and_one_that_fails_is_named(
    command, monkeypatch, tmp_path, failed, code
):
    """On simulated GPUs: the workers themselves are tested with simulated work."""
    given = []
    monkeypatch.setattr("profiler.nvml.gpu_count", lambda: 2)
    monkeypatch.setattr(
        "profiler.nvml.cuda_info",
        lambda index: DeviceInfo(kind="cuda", name="Simulated", uuid=f"GPU-{index}", isa="sm_90"),
    )
    monkeypatch.setattr(sweep, "one_each", lambda *arguments: given.append(arguments) or failed)
    found, _, errors = command("--config", "tiny.toml", "--device", "all", "--out", "run")
    ((work, devices, config, name, location),) = given
    assert (work, devices, name) == (sweep.work, ["cuda:0", "cuda:1"], "tiny")
    assert SweepConfig.model_validate_json(config).workloads
    open_store(tmp_path / location).close()
    assert found == code and errors.count("\n") == len(failed)
    assert all(device in errors for device in failed)


def test_energy_is_measured_of_the_shapes_that_ask_and_its_time_told_before(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(sites.LocalSite, "energy_s", lambda site: 30.0)
    reading = EnergyReading(1.5, 0.5, 15.0, "simulated", windows_mj=(1.4, 1.6))
    monkeypatch.setattr(sites.LocalSite, "energy", lambda site, launch: reading)
    shapes = ({"m": 20, "k": 16, "n": 32, "energy": True}, {"m": 10, "k": 16, "n": 32})
    config = SweepConfig(timing="quick", forms=("mult_fp32",), shapes=shapes)
    (setting,) = settings_for(config, "energy", "cpu", "1")
    store = create_store(tmp_path / "a.sqlite")
    rows = sweep.sweep(setting, store)
    store.close()
    asked = [row for row in rows if row.workload.m == 20]
    assert all(row.energy_mj == 1.5 and row.energy_source == "simulated" for row in asked)
    assert all(row.details["energy_cv"] == reading.variation for row in asked)
    others = [row for row in rows if row.workload.m == 10]
    assert all(row.energy_mj is None and "did not ask" in row.energy_reason for row in others)
    assert len(others) == len(asked)
    minutes = len(asked) * 30 / 60
    told = f"energy of {len(asked)} rows: some 30 s each, {minutes:.0f} min"
    assert told in capsys.readouterr().out


def test_energy_is_asked_for_by_an_option_which_is_named_where_there_is_a_meter(
    command, monkeypatch, tmp_path
):
    monkeypatch.setattr(sites.LocalSite, "energy_s", lambda site: 30.0)
    reading = EnergyReading(1.5, 0.5, 15.0, "simulated", windows_mj=(1.4, 1.6))
    monkeypatch.setattr(sites.LocalSite, "energy", lambda site, launch: reading)
    hint = "energy was not asked for: --energy measures it, some 30 s a row"
    for name, options in (("without", []), ("with", ["--energy"])):
        _, out, _ = command("--config", "tiny.toml", "--store", f"{name}.sqlite", *options)
        rows = rows_of(tmp_path / f"{name}.sqlite")
        assert {row.energy_mj for row in rows} == {1.5 if options else None}
        assert (hint in out) == (not options)
        assert all("--energy" in row.energy_reason for row in rows if not options)


def sweep_into(path, barrier):
    """One of two processes; they start to write in the same moment."""
    PRESETS["quick"] = SHORT
    sites.measure_roofs = lambda *_: {}
    (setting,) = settings_for(CONFIG, "shared", "cpu", "1")
    store = create_store(path)
    sweep.sweep(setting, store, ready=barrier.wait)
    store.close()


def test_two_sweeps_may_write_one_store_at_once(tmp_path):
    path = tmp_path / "shared.sqlite"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["profiler.sweep"])
    barrier = context.Barrier(2)
    workers = [context.Process(target=sweep_into, args=(path, barrier)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = sorted((row.workload.form, row.lowering) for row in rows_of(path))
    (setting,) = settings_for(CONFIG, "shared", "cpu", "1")
    wanted = sorted((c.workload.form, c.lowering) for c in candidates.candidates(setting))
    assert found == wanted


def test_all_workloads_of_a_shape_list_are_measured_once():
    config = SweepConfig(
        forms=("mult_fp32",), shapes=({"m": [1, 2], "k": 3, "n": 4}, {"m": 2, "k": 3, "n": 4})
    )
    assert config.workloads == [linear("mult_fp32", 1, 3, 4), linear("mult_fp32", 2, 3, 4)]


def test_the_clock_is_that_of_the_fastest_loop():
    """On a simulated time: every loop takes 2 ms but one, which takes 1 ms."""
    ticks = iter([t for i in range(4) for t in (i, i + (0.001 if i == 2 else 0.002))])
    fast = clock_rate(1, lambda: next(ticks))
    ticks = iter([t for i in range(4) for t in (i, i + 0.002)])
    assert fast == pytest.approx(2 * clock_rate(1, lambda: next(ticks)))
