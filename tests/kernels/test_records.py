"""Tuning records: text that round-trips, is refused when foreign, and decides what is built."""

import json
from dataclasses import asdict, replace

import pytest

from kernels import records
from kernels.build import LOWERINGS, BuildError, build, lowerings
from kernels.records import (
    OWN_RECORDS,
    SHIPPED,
    TVM_VERSION,
    Record,
    RecordError,
    append_record,
    known_records,
    load_records,
    lookup,
)
from kernels.reference import max_abs_error, random_operands
from kernels.targets import cpu_target
from kernels.workload import linear

WORKLOAD = linear("mult_fp32", 196, 40, 72)
RECORD = Record(
    family=WORKLOAD.family,
    tokens=196,
    lowering="mult.panels",
    chip="znver5",
    threads=1,
    schedule={"tile_rows": 9, "panels_outer": 1},
    latency_ms=0.5,
    default_latency_ms=0.75,
    device="0123456789abcdef",
    tvm=TVM_VERSION,
    created_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture(autouse=True)
def _only_these_records(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "SHIPPED", tmp_path / "tuned")
    monkeypatch.delenv(OWN_RECORDS, raising=False)
    records._load_or_warn.cache_clear()
    yield
    records._load_or_warn.cache_clear()


def find(*found, workload=WORKLOAD, threads=1):
    return lookup(found, workload, "mult.panels", "znver5", threads)


def test_records_round_trip_and_the_last_of_a_key_counts(tmp_path):
    path = tmp_path / "r.jsonl"
    newer = replace(RECORD, latency_ms=0.25)
    other = replace(RECORD, threads=2)
    for record in (RECORD, other, newer):
        append_record(path, record)
    assert load_records(path) == [newer, other]
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
    assert RECORD.speedup == 1.5


FAMILY = RECORD.family.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tvm": "0.1"}, f"tvm: tuned with 0.1, this is {TVM_VERSION}"),
        ({"latency_ms": 0.0}, "latency_ms: 0.0 cannot be"),
        ({"latency_ms": None}, "latency_ms: None cannot be"),
        ({"latency_ms": float("nan")}, "latency_ms: nan cannot be"),
        ({"schedule": {"tile_rows": "9"}}, "schedule: "),
        ({"tokens": 0}, "tokens: 0 cannot be"),
        ({"family": {"primitive": "mult"}}, "m: is missing"),
        ({"family": FAMILY | {"fused": 5}}, "fused: cannot be 5"),
        ({"family": FAMILY | {"fused": ["a", 1]}}, "fused: "),
        ({"family": FAMILY | {"fused": [["a"]]}}, "fused: "),
        ({"family": FAMILY | {"x_dtype": []}}, "x_dtype: cannot be []"),
        ({"family": FAMILY | {"exponent_min": "x"}}, "exponent_min: cannot be 'x'"),
        ({"colour": 1}, "colour: is no field"),
    ],
)
def test_a_bad_line_is_refused_with_its_place(tmp_path, change, message):
    path = tmp_path / "r.jsonl"
    values = asdict(RECORD) | {"family": RECORD.family.to_dict()} | change
    path.write_text(f"{RECORD.to_line()}\n{json.dumps(values)}\n")
    with pytest.raises(RecordError) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}: line 2: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["{", "[]", "3", "{}", RECORD.to_line()[:-20]])
def test_what_is_no_record_is_refused(tmp_path, line):
    path = tmp_path / "r.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(RecordError, match="line 1"):
        load_records(path)


def test_lookup_takes_the_nearest_tokens_then_threads():
    few, many = replace(RECORD, tokens=150), replace(RECORD, tokens=300)
    two = replace(RECORD, threads=2)
    assert find(few, many, two) == two
    assert find(few, many) == few
    assert find(RECORD, two, threads=2) == two
    assert find(RECORD, two, threads=8) == two
    assert find(RECORD, replace(RECORD, latency_ms=0.1)).latency_ms == 0.1


@pytest.mark.parametrize(
    "change",
    [
        {"chip": "znver4"},
        {"lowering": "mult.other"},
        {"family": linear("mult_fp32", 1, 40, 73)},
        {"tokens": 97},
        {"tokens": 393},
    ],
)
def test_lookup_takes_no_foreign_record(change):
    assert find(replace(RECORD, **change)) is None
    assert find() is None


def test_a_kernel_for_any_tokens_takes_the_record_of_the_most():
    most = replace(RECORD, tokens=3136)
    assert find(RECORD, most, replace(RECORD, tokens=49), workload=WORKLOAD.family) == most


def test_build_takes_the_record_and_stays_right(monkeypatch, tmp_path):
    path = tmp_path / "own.jsonl"
    chip = cpu_target().chip
    default = build(WORKLOAD).schedule
    assert default == LOWERINGS["mult.panels"].default_schedule(WORKLOAD, cpu_target())
    other = next(
        {"tile_rows": rows, "panels_outer": 1}
        for rows in LOWERINGS["mult.panels"].schedule_space(cpu_target())["tile_rows"]
        if rows != default["tile_rows"]
    )
    append_record(path, replace(RECORD, chip=chip, schedule=other))
    monkeypatch.setenv(OWN_RECORDS, str(path))
    tuned = build(WORKLOAD)
    assert tuned.schedule == other
    operands = random_operands(WORKLOAD)
    assert max_abs_error(WORKLOAD, operands, tuned(operands))[1]
    assert build(linear("mult_fp32", 1000, 40, 72)).schedule == default
    assert build(WORKLOAD, schedule=default).schedule == default


def test_unreadable_records_are_warned_about_once_and_not_used(monkeypatch, tmp_path, recwarn):
    path = tmp_path / "own.jsonl"
    path.write_text("nonsense\n")
    monkeypatch.setenv(OWN_RECORDS, str(path))
    assert known_records("znver5") == () == known_records("znver5")
    assert len(recwarn) == 1 and f"{path}: line 1" in str(recwarn[0].message)


@pytest.mark.parametrize("schedule", [{}, {"tile_rows": 7}, {"tile_rows": 99, "panels_outer": 0}])
def test_a_schedule_outside_the_space_is_refused(schedule):
    with pytest.raises(BuildError, match=r"mult\.panels"):
        build(WORKLOAD, schedule=schedule)


def test_every_schedule_computes_the_same_product():
    for form in ("mult_fp32", "shift_fp32", "mult_int8"):
        workload = linear(form, 29, 24, 40)
        operands = random_operands(workload)
        for name in lowerings(workload):
            space = LOWERINGS[name].schedule_space(cpu_target())
            every = space["tile_rows"]
            for place, rows in enumerate(every[:: max(1, len(every) // 3)]):
                others = {key: values[place % len(values)] for key, values in space.items()}
                schedule = {**others, "tile_rows": rows}
                kernel = build(workload, name, schedule=schedule)
                assert max_abs_error(workload, operands, kernel(operands))[1]


def test_a_record_of_an_older_schedule_is_warned_about_and_not_used(monkeypatch, tmp_path):
    target = cpu_target()
    older = replace(RECORD, chip=target.chip, schedule={"tile_rows": 9})
    append_record(tmp_path / "own.jsonl", older)
    monkeypatch.setenv(OWN_RECORDS, str(tmp_path / "own.jsonl"))
    with pytest.warns(UserWarning, match="mult.panels ignored"):
        kernel = build(WORKLOAD, "mult.panels")
    default = LOWERINGS["mult.panels"].default_schedule(WORKLOAD, target)
    assert kernel.schedule == default


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.jsonl")), ids=lambda path: path.stem)
def test_shipped_records_can_be_built(path):
    found = load_records(path)
    assert found
    for record in found:
        space = LOWERINGS[record.lowering].schedule_space(cpu_target(path.stem))
        assert record.chip == path.stem
        assert all(record.schedule[name] in values for name, values in space.items())
        assert record.schedule.keys() == space.keys()
        assert record.latency_ms <= record.default_latency_ms
