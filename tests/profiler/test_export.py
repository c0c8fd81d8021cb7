import csv
import json

import pandas as pd
import pytest

from kernels.workload import linear
from profiler.command_line import run
from profiler.device import DeviceInfo
from profiler.export import TIMM_COLUMNS, app, timm_rows
from profiler.store import Measurement, create_store

DEVICE = DeviceInfo(kind="cpu", name="Synthetic CPU", threads=1)
WORKLOAD = linear("shift_int8", 8, 16, 32)


def row(**fields):
    about = {"device": DEVICE, "lowering": "x", "latency_ms": 4.0, "energy_reason": "no meter"}
    return Measurement(**about | fields)


def model(subject, latency_ms, **details):
    details = {"model": "pvt_v2_b0", "batch": 32} | details
    return row(kind="model", subject=subject, latency_ms=latency_ms, details=details)


ROWS = [
    row(workload=WORKLOAD, subject=WORKLOAD.label, relative_error=0.14, noise_floor=0.01),
    row(workload=WORKLOAD, subject=WORKLOAD.label, cache="cold", samples_ms=(3.0, 4.0, 5.0)),
    row(subject="broken", latency_ms=None, status="failed", reason='a, "b"\nc'),
    model("original", 80.0, image_size=224, parameters=3_666_760),
    model("shift", 40.0),
]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Runs the command beside a store of ROWS: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    store = create_store("rows.sqlite")
    store.put(*ROWS)
    store.close()
    create_store("empty.sqlite").close()

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["export", *arguments])
        with pytest.raises(SystemExit) as exit_:
            run(app)
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("name", "read"), [("r.csv", pd.read_csv), ("r.parquet", pd.read_parquet)])
def test_every_row_is_exported_with_every_figure(command, tmp_path, name, read):
    code, out, _ = command("--store", "rows.sqlite", "--to", f"new/{name}")
    assert (code, out) == (0, f"5 rows → new/{name}\n")
    frame = read(tmp_path / "new" / name).set_index("key")
    for written in ROWS:
        found = frame.loc[written.key]
        for field in ("subject", "cache", "status", "reason", "latency_ms", "relative_error"):
            value = getattr(written, field)
            assert pd.isna(found[field]) if value is None else found[field] == value
        assert json.loads(found["details"]) == written.details
        if written.workload:
            assert json.loads(found["workload"]) == written.workload.to_dict()
            assert (found["form"], found["n"]) == ("shift_int8", 32)
    assert frame["energy_mj"].isna().all()


def test_a_parquet_column_without_figures_has_its_type(command, tmp_path):
    command("--store", "empty.sqlite", "--to", "e.parquet")
    types = pd.read_parquet(tmp_path / "e.parquet").dtypes
    assert types["energy_mj"] == "float64" and types["weight_bytes"] == "Int64"


def test_models_have_timms_columns_the_fastest_first(command, tmp_path):
    code, _, _ = command("--store", "rows.sqlite", "--timm", "timm.csv")
    assert code == 0
    with (tmp_path / "timm.csv").open() as file:
        fastest, original = csv.DictReader(file)
    assert list(original) == list(TIMM_COLUMNS)
    assert list(original.values()) == ["pvt_v2_b0", "400.0", "80.0", "32", "224", "3.67"]
    assert list(fastest.values()) == ["pvt_v2_b0.shift", "800.0", "40.0", "32", "", ""]


def test_an_original_and_a_deployed_model_of_one_evaluation_are_told_apart():
    rows = [
        Measurement(
            kind="model",
            subject="pvt_v2_b0, batch 1",
            device=DEVICE,
            lowering=lowering,
            latency_ms=ms,
            energy_reason="none",
            details={"model": "pvt_v2_b0", "batch": 1},
        )
        for lowering, ms in (("torch", 40.0), ("deployed", 10.0))
    ]
    assert list(timm_rows(rows)["model"]) == ["pvt_v2_b0.deployed", "pvt_v2_b0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--store", "rows.sqlite"], "--to or --timm"),
        (["--store", "rows.sqlite", "--to", "rows.xlsx"], "--to rows.xlsx: must end in"),
        (["--store", "rows.sqlite", "--timm", "rows.parquet"], "--timm rows.parquet"),
        (["--store", "empty.sqlite", "--timm", "t.csv", "--to", "r.csv"], "empty.sqlite"),
        (["--store", "absent.sqlite", "--to", "r.csv"], "absent.sqlite: no such store"),
        (["--store", "rows.sqlite", "--to", "rows.sqlite/r.csv"], "rows.sqlite"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(command, tmp_path, arguments, named):
    before = sorted(tmp_path.iterdir())
    code, out, errors = command(*arguments)
    assert (code, out) == (2, "")
    assert named in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before
