import json
import math
import random
import subprocess
import sys
import timeit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_models.fitted_model import WIDEN_PER_OCTAVE
from cost_models.latency_table import LatencyTable, TableError
from kernels.workload import Workload, attention, linear

MEASURED = linear("shift_int8", m=784, k=128, n=1024)
BETWEEN = linear("shift_int8", m=500, k=128, n=1024)
OUTSIDE = linear("shift_int8", m=50_000, k=128, n=1024)


def test_round_trip(table, tmp_path):
    path = tmp_path / "latency_table.json"
    table.save(path)
    again = LatencyTable.load(path)
    assert again == table
    assert again.sha256 == table.sha256
    for workload in (MEASURED, BETWEEN, OUTSIDE):
        assert again.lookup(workload) == table.lookup(workload)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_hash_is_of_the_content(table, tmp_path):
    path = tmp_path / "latency_table.json"
    content = table.model_dump(mode="json")
    path.write_text(json.dumps(content))
    assert LatencyTable.load(path).sha256 == table.sha256
    content["entries"][0]["high_ms"] *= 2
    path.write_text(json.dumps(content))
    assert LatencyTable.load(path).sha256 != table.sha256


# A table without anything that came to the format later.
PLAIN = {
    "format": "shiftadd-latency-table",
    "version": 2,
    "device": {
        "kind": "cpu",
        "name": "synthetic",
        "uuid": None,
        "isa": "",
        "threads": 1,
        "cores": 4,
        "memory_bytes": 0,
        "last_level_cache_bytes": None,
        "sm_clock_mhz": None,
        "memory_clock_mhz": None,
        "power_limit_w": None,
        "ecc": None,
        "mig": None,
        "driver": None,
        "cuda": None,
        "governor": None,
        "os": "",
        "software": {},
    },
    "created_at": "2026-01-01T00:00:00+00:00",
    "store": "rows.sqlite",
    "entries": [
        {
            "workload": linear("shift_int8", 49, 64, 96).to_dict(),
            "lowering": "shift.dot",
            "is_baseline": False,
            "latency_ms": 0.25,
            "low_ms": 0.2,
            "high_ms": 0.3,
            "weight_bytes": 6144,
            "energy_mj": None,
            "energy_source": None,
            "energy_reason": "no counter",
        }
    ],
    "models": [
        {
            "form": "shift_int8",
            "lowering": "shift.dot",
            "is_baseline": False,
            "core": {
                "name": "tiles",
                "units": 1,
                "tile_rows": 1,
                "tile_columns": 16,
                "l2_bytes": 2**20,
                "l3_bytes": 2**25,
                "costs_ms": {"launch": 0.001},
            },
            "length_scales": {},
            "variance": 0.01,
            "noise": 0.01,
            "foreign_rows": 0,
            "foreign_noise": 0.0,
            "interval_width": 1.645,
            "hull": {key: [0.0, 1.0] for key in ("b", "m", "k", "n", "macs", "traffic_bytes")},
            "points": [[]],
            "residuals": [0.0],
        }
    ],
    "energy_models": [],
    "overheads": None,
}


def test_the_hash_of_a_table_stays_what_runs_have_noted(tmp_path):
    path = tmp_path / "latency_table.json"
    path.write_text(json.dumps(PLAIN))
    noted = "3e3ee4cbeb0f411ab08c891964e0baaa23cfdc6e24a8c49c5797ba368a0eeb1b"
    assert LatencyTable.load(path).sha256 == noted


def test_sources(table, law):
    measured, between, outside = (table.lookup(w) for w in (MEASURED, BETWEEN, OUTSIDE))
    assert measured.source == "measured"
    entry = next(e for e in table.entries if e.workload == MEASURED and e.lowering == "shift.tiled")
    assert measured.latency_ms == entry.latency_ms
    assert between.source == "predicted"
    assert between.latency_ms == pytest.approx(law(BETWEEN), rel=0.1)
    assert outside.source == "extrapolated"
    assert outside.latency_ms == pytest.approx(law(OUTSIDE), rel=0.3)
    for estimate in (measured, between, outside):
        assert estimate.low_ms < estimate.latency_ms < estimate.high_ms
        assert estimate.energy_mj > 0
        assert estimate.energy_source == "modelled" and estimate.energy_reason


def test_intervals_widen_by_the_stated_rule(table):
    octaves = math.log2(50_000 / 3136)
    wide = table.lookup(OUTSIDE)
    assert wide.high_ms / wide.latency_ms > WIDEN_PER_OCTAVE**octaves
    near = table.lookup(linear("shift_int8", m=8_000, k=128, n=1024))
    assert wide.high_ms / wide.latency_ms > near.high_ms / near.latency_ms


def test_strict_refuses_only_what_is_outside(table):
    assert table.lookup(BETWEEN, strict=True).source == "predicted"
    with pytest.raises(TableError, match="outside the measured shapes"):
        table.lookup(OUTSIDE, strict=True)


def test_large_in_every_direction_is_outside_although_no_size_is(table):
    corner = linear("shift_int8", m=3136, k=1280, n=1280)
    assert table.lookup(corner).source == "extrapolated"


def test_the_fastest_of_ours_unless_one_is_named(table):
    assert table.lookup(BETWEEN).lowering == "shift.tiled"
    slow = table.lookup(BETWEEN, lowering="shift.simple")
    assert slow.lowering == "shift.simple"
    assert slow.latency_ms > table.lookup(BETWEEN).latency_ms
    dense = linear("mult_fp32", 49, 64, 512)
    assert table.lookup(dense, lowering="torch.fp32").latency_ms < table.lookup(dense).latency_ms
    assert table.lookup(dense).lowering == "mult.tiled"


def test_what_it_knows(table):
    assert table.forms == ("add_qkv_pm1", "mult_fp32", "shift_int8")
    assert table.lowerings("shift_int8") == ("shift.simple", "shift.tiled")
    assert table.lowerings("mult_fp32") == ("mult.tiled", "torch.fp32")
    assert table.lowerings("mult_fp32", baselines=False) == ("mult.tiled",)
    assert table.lowerings("mult_bf16") == ()


@pytest.mark.parametrize(
    ("workload", "lowering", "message"),
    [
        (linear("mult_bf16", 8, 8, 8), None, r"'mult_bf16'.*python -m profiler\.sweep"),
        (attention(1, 8, 16, 8)[0], None, "add_kv_pm1"),
        (MEASURED, "shift.magic", r"shift\.magic.*known: shift\.simple, shift\.tiled"),
        # Two rows are no model, and one dtype more is another workload.
        (linear("mult_fp32", 50, 64, 512), None, r"was not measured.*profiler\.sweep"),
        (
            Workload.from_dict(BETWEEN.to_dict() | {"out_dtype": "bfloat16"}),
            None,
            "was not measured",
        ),
    ],
)
def test_what_it_does_not_know(table, workload, lowering, message):
    with pytest.raises(TableError, match=message):
        table.lookup(workload, lowering)


def test_only_baselines(table):
    only = table.model_copy(
        update={"entries": (), "models": tuple(m for m in table.models if m.is_baseline)}
    )
    only = LatencyTable.model_validate_json(only.model_dump_json())
    with pytest.raises(TableError, match="only baselines"):
        only.lookup(linear("mult_fp32", 100, 64, 512))
    assert only.lookup(linear("mult_fp32", 100, 64, 512), "torch.fp32").latency_ms > 0


@given(st.sampled_from([(64, 512), (320, 1280)]), st.integers(49, 1500))
@settings(max_examples=40)
def test_twice_the_tokens_take_longer(table, shape, m):
    one, two = (table.lookup(linear("shift_int8", t, *shape), "shift.tiled") for t in (m, 2 * m))
    assert two.latency_ms > one.latency_ms


def small(table):
    """One model and one entry of each kind: enough to be mutated everywhere."""
    content = table.model_dump(mode="json")
    content["entries"] = content["entries"][:1]
    content["models"] = [m for m in content["models"] if m["lowering"] == "shift.simple"]
    return content


@pytest.fixture(scope="module")
def valid_text(table):
    return json.dumps(small(table))


def paths(node, at=()):
    yield at
    children = node.items() if isinstance(node, dict) else enumerate(node)
    for key, child in children:
        if isinstance(child, dict | list):
            yield from paths(child, (*at, key))
        else:
            yield (*at, key)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**320), 10**320),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.lists(st.floats(0, 1), max_size=3),
)


@given(st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_malformed_table_gives_a_traceback(valid_text, tmp_path, data):
    content = json.loads(valid_text)
    at = data.draw(st.sampled_from([p for p in paths(content) if p]))
    parent = content
    for key in at[:-1]:
        parent = parent[key]
    if data.draw(st.booleans()):
        del parent[at[-1]]
    else:
        parent[at[-1]] = data.draw(JUNK)
    path = tmp_path / "latency_table.json"
    path.write_text(json.dumps(content))
    try:
        loaded = LatencyTable.load(path)
        estimate = loaded.lookup(BETWEEN)
    except TableError as error:
        assert "\n" not in str(error)
    else:
        assert 0 < estimate.latency_ms < math.inf


@pytest.mark.parametrize("name", ["format", "version", "device", "entries", "models", "store"])
def test_a_missing_key_is_named(table, tmp_path, name):
    content = small(table)
    del content[name]
    path = tmp_path / "latency_table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=rf"^{path}: {name}: Field required$"):
        LatencyTable.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "file: Invalid JSON"),
        (b"\x80\x04\x95", "file: Invalid JSON"),
        (b"[1]", "file: "),
        (b"[" * 100_000, "file: "),
        (b'{"format": "nn-meter", "version": 1}', "format: "),
        (b'{"format": "shiftadd-latency-table", "version": 1, "rows": []}', "version: .* 2"),
        (b'{"format": "shiftadd-latency-table", "version": "1"}', "version: "),
    ],
)
def test_a_foreign_file_is_refused(tmp_path, text, message):
    path = tmp_path / "latency_table.json"
    path.write_bytes(text)
    with pytest.raises(TableError, match=f"^{path}: {message}"):
        LatencyTable.load(path)


@pytest.mark.parametrize("name", ["none.json", "n" * 300, "a\0b"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(TableError, match="cannot be read"):
        LatencyTable.load(tmp_path / name)


@pytest.mark.parametrize("where", ["entries", "models"])
def test_a_double_answer_is_refused(table, tmp_path, where):
    content = small(table)
    content[where] *= 2
    path = tmp_path / "latency_table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(TableError, match=f"{where}: .* given twice"):
        LatencyTable.load(path)


def test_loading_needs_neither_torch_nor_scikit_learn():
    code = (
        "import sys, cost_models.latency_table as _;"
        "print(sorted({'torch', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_200_damaged_files_each_give_one_line_that_names_the_file(valid_text, tmp_path):
    chance = random.Random(0)
    path, refused = tmp_path / "latency_table.json", 0
    for _ in range(200):
        content = bytearray(valid_text.encode())
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(content))
            damage = chance.choice(("flip", "cut", "insert", "repeat"))
            if damage == "flip":
                content[at] = chance.randrange(256)
            elif damage == "cut":
                del content[at : at + chance.choice((1, 10, len(content)))]
            elif damage == "insert":
                content[at:at] = chance.choice((b"}", b'"', b"null", b"1e999", b"\x00", b"[" * 999))
            else:
                content[at:at] = content[max(0, at - 40) : at]
            if not content:
                break
        path.write_bytes(content)
        try:
            LatencyTable.load(path).lookup(BETWEEN)
        except TableError as error:
            refused += 1
            assert "\n" not in str(error)
            assert str(error).startswith(f"{path}: ") or "python -m profiler.sweep" in str(error)
    assert refused > 150


def test_a_second_lookup_costs_less_than_the_key_of_a_workload(table):
    def fastest(action):
        return min(timeit.repeat(action, number=200, repeat=5))

    table.lookup(BETWEEN)
    assert fastest(lambda: table.lookup(BETWEEN)) < fastest(lambda: BETWEEN.key)


@pytest.mark.parametrize("field", ["fused", "exponent_min", "x_dtype"])
def test_a_workload_of_strange_types_is_refused_or_answered(table, tmp_path, field):
    for junk in ([[1]], {}, [], "bias", 1.5, None, [None]):
        content = small(table)
        content["entries"][0]["workload"][field] = junk
        path = tmp_path / "latency_table.json"
        path.write_text(json.dumps(content))
        try:
            assert LatencyTable.load(path).lookup(BETWEEN).latency_ms > 0
        except TableError as error:
            assert "\n" not in str(error)
