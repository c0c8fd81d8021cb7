import csv
import gzip
import io
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cost_models import table_diff
from cost_models.latency_table import LatencyTable, TableError
from cost_models.shipped_rows import rows_path, rows_to_bytes, shipped_rows
from cost_models.shipped_tables import FOLDER, SHIPPED, shipped_for, shipped_path, table_name
from cost_models.table import app, schema, to_csv
from cost_models.training_rows import at_full_clock
from kernels.workload import Workload, linear
from profiler.command_line import BadInput
from profiler.device import DeviceInfo
from profiler.store import create_store, full_clock

runner = CliRunner()


def changed(table, factor, entry=0):
    """The table with one row slower by a factor."""
    content = table.model_dump(mode="json")
    for name in ("latency_ms", "low_ms", "high_ms"):
        content["entries"][entry][name] *= factor
    return LatencyTable.model_validate_json(json.dumps(content))


def test_csv_has_every_row_and_leads_back_to_its_workload(table):
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert len(rows) == len(table.entries)
    for row, entry in zip(rows, table.entries):
        assert Workload.from_dict(json.loads(row["workload"])) == entry.workload
        assert float(row["latency_ms"]) == entry.latency_ms
        assert row["is_baseline"] == str(entry.is_baseline)
        assert row["form"] == entry.workload.form


def test_csv_leaves_a_missing_figure_empty(table):
    content = table.model_dump(mode="json")
    content["entries"][0] |= {"weight_bytes": None, "energy_mj": None, "energy_source": None}
    row = next(
        csv.DictReader(io.StringIO(to_csv(LatencyTable.model_validate(content, strict=False))))
    )
    assert row["energy_mj"] == row["weight_bytes"] == ""


@pytest.mark.parametrize(
    ("factor", "change"), [(1.5, "slower"), (1 / 1.5, "faster"), (1.05, "same"), (1.0, "same")]
)
def test_diff_tells_what_is_beyond_the_interval_and_the_threshold(table, factor, change):
    rows = table_diff.diff(table, changed(table, factor))
    assert rows[0].change == change
    assert {row.change for row in rows[1:]} == {"same"}
    assert rows[0].speed == pytest.approx(1 / factor)


def test_diff_names_what_only_one_has(table):
    content = table.model_dump(mode="json")
    missing = content["entries"].pop(3)
    dropped = content["models"].pop()
    less = LatencyTable.model_validate_json(json.dumps(content))
    rows = table_diff.diff(table, less)
    (gone,) = [row for row in rows if row.change == "only in the first"]
    assert gone.lowering == missing["lowering"] and gone.second_ms is None and gone.speed is None
    assert [r.change for r in table_diff.diff(less, table)].count("only in the second") == 1
    text = " ".join(table_diff.summary(table, less, rows))
    assert f"{dropped['form']} {dropped['lowering']}" in text


def test_the_commands(table, tmp_path):
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    table.save(first)
    changed(table, 2).save(second)
    said = runner.invoke(app, ["diff", str(first), str(second)])
    assert said.exit_code == 0 and "1 slower" in said.output
    assert "equal" in runner.invoke(app, ["diff", str(first), str(first)]).output
    assert table.device.fingerprint in runner.invoke(app, ["show", str(first)]).output
    out = tmp_path / "rows.csv"
    assert runner.invoke(app, ["csv", str(first), "--out", str(out)]).exit_code == 0
    assert out.read_text() == to_csv(table)


def test_a_bad_table_is_one_line_and_exit_2(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    command = [
        sys.executable,
        "-m",
        "cost_models.table",
        "csv",
        str(bad),
        "--out",
        str(tmp_path / "o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: {bad}: format: Field required\n"
    assert not (tmp_path / "o").exists()


def test_the_schema_that_ships_is_current():
    path = FOLDER.parent / "latency_table.schema.json"
    command = "python -m cost_models.table schema > cost_models/latency_table.schema.json"
    assert json.loads(path.read_text()) == schema(), f"run `{command}`"


def test_a_table_keeps_to_the_schema(table):
    found, content = schema(), table.model_dump(mode="json")
    assert set(found["required"]) <= set(content) <= set(found["properties"])
    entry = found["$defs"]["Entry"]
    for one in content["entries"]:
        assert set(entry["required"]) <= set(one) <= set(entry["properties"])
        assert set(one["workload"]) == set(entry["properties"]["workload"]["properties"])
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(content, found)


def test_a_gzipped_table_is_the_same_table(table, tmp_path):
    path = tmp_path / "latency_table.json"
    table.save(path)
    assert runner.invoke(app, ["ship", str(path), "--folder", str(tmp_path)]).exit_code == 0
    (packed,) = tmp_path.glob("*.json.gz")
    assert packed.name == f"{table_name(table.device)}.json.gz"
    assert LatencyTable.load(packed).sha256 == table.sha256
    packed.write_bytes(packed.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no gzip archive"):
        LatencyTable.load(packed)


def test_rows_ship_without_their_samples_and_come_back(sweep, tmp_path):
    rows_path("x", tmp_path).write_bytes(rows_to_bytes(sweep))
    again = shipped_rows("x", tmp_path)
    assert [(r.key, r.latency_ms, r.status) for r in again] == [
        (r.key, r.latency_ms, r.status) for r in sweep
    ]
    with pytest.raises(ValueError, match="no rows ship"):
        shipped_rows("y", tmp_path)


def test_damaged_rows_are_named_by_file_and_line(sweep, tmp_path):
    path = rows_path("x", tmp_path)
    whole = rows_to_bytes(sweep)
    incomplete = gzip.compress(gzip.decompress(whole) + b'{"kind": "primitive"}\n')
    for content, message in (
        (whole[:50], "is no gzip archive"),
        (b"no archive", "is no gzip archive"),
        (incomplete, rf"line {len(sweep) + 1}: \w+: Field required"),
    ):
        path.write_bytes(content)
        with pytest.raises(TableError, match=rf"x\.rows\.jsonl\.gz: {message}"):
            shipped_rows("x", tmp_path)


def test_rows_of_another_device_do_not_ship_with_a_table(table, measure, tmp_path):
    path, store = tmp_path / "latency_table.json", tmp_path / "other.sqlite"
    table.save(path)
    other = table.device.model_copy(update={"threads": 2})
    opened = create_store(store)
    opened.put(measure(linear("shift_int8", 8, 16, 16), 1.0, device=other))
    opened.close()
    said = runner.invoke(app, ["ship", str(path), "--store", str(store), "--folder", str(tmp_path)])
    assert isinstance(said.exception, BadInput) and "other.sqlite: no row" in str(said.exception)
    assert not list(tmp_path.glob("*.gz"))


@pytest.mark.parametrize(("name", "fingerprint"), SHIPPED.items())
def test_what_ships_is_named_after_its_device_and_can_be_fitted_again(name, fingerprint):
    table = LatencyTable.load(name)
    assert table.device.fingerprint == fingerprint
    assert table_name(table.device) == name and shipped_for(table.device) == name
    assert shipped_path(name).stat().st_size <= 2**20
    rows = [row for row in shipped_rows(name) if row.kind == "primitive"]
    # Rows without a latency have a clock as well.
    full = full_clock(rows)
    known = {(r.workload, r.lowering): at_full_clock(r, full).latency_ms for r in rows}
    assert all(known[e.workload, e.lowering] == e.latency_ms for e in table.entries)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ({"kind": "cpu", "isa": "x86_64 25/17 avx512_vnni avx512f avx2", "threads": 1, "cores": 2},
         "amd-zen4-avx512-2c-1t"),
        ({"kind": "cpu", "isa": "x86_64 25/33 avx2", "threads": 8, "cores": 8},
         "amd-zen3-avx2-8c-8t"),
        ({"kind": "cpu", "isa": "x86_64 6/167 avx512f amx_int8 avx2", "threads": 1, "cores": 2,
          "name": "Intel(R) Xeon(R) Processor"}, "intel-xeon-amx-2c-1t"),
        ({"kind": "cpu", "isa": "aarch64 asimd", "threads": 4, "cores": 4},
         "some-chip-9-asimd-4c-4t"),
        ({"kind": "cuda", "name": "NVIDIA H200", "isa": "sm_90"}, "h200"),
        ({"kind": "cuda", "name": "NVIDIA A100-SXM4-80GB", "isa": "sm_80"}, "a100-sxm4-80gb"),
    ],
)  # fmt: skip
def test_names_of_tables(device, name):
    assert table_name(DeviceInfo(**{"name": "Some Chip (9)"} | device)) == name


def test_a_name_that_does_not_ship_says_what_does():
    with pytest.raises(ValueError, match=r"nosuch: cannot be read .*ship"):
        LatencyTable.load("nosuch")
