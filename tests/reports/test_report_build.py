import re
import shutil
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_run import (
    DEVICE,
    fit_result,
    measurements,
    primitive_row,
    results,
    write_run,
    write_store,
)
from typer.testing import CliRunner

from kernels.workload import linear
from profiler.command_line import BadInput
from profiler.store import Measurement
from reports.build import app, build
from reports.comparisons import compare, median_own_mult
from reports.formats import significant
from reports.html import MAX_ROWS

FILES = ("measurements.sqlite", "latency_table.json", "fit.json", "results.json")
SECTIONS = (
    "verdict",
    "key-figures",
    "where",
    "advice",
    "kernels",
    "rivals",
    "layers",
    "growth",
    "scaling",
    "accuracy",
    "ablation",
    "energy",
    "weights",
    "routing",
    "training",
    "agreement",
    "prediction",
    "noise",
    "machine",
    "method",
)
HOSTILE = "<script>alert(1)</script> & $x$ $\\frac{"


class Reader(HTMLParser):
    """Collects identifiers, tables by caption, links and the text of the SVGs."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text: dict[str, str] = {}
        self.loads: list[str] = []
        self._caption, self._open, self._section = "", "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        self.loads += [found[name] for name in ("src", "href", "data", "srcset") if name in found]
        if tag == "section":
            self._section = found.get("id", "")
        if tag in ("summary", "td", "th", "text"):
            self._open = tag
        if tag == "summary":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag == "span" and self._open == "td":
            self.tables[self._caption][-1][-1] += " | "

    def handle_endtag(self, tag):
        if tag in ("summary", "td", "th", "text"):
            self._open = ""

    def handle_data(self, data):
        self.text[self._section] = self.text.get(self._section, "") + data
        if self._open == "summary":
            self._caption += data
        if self._open in ("td", "th"):
            self.tables[self._caption][-1][-1] += data

    def table(self, start: str) -> list[list[str]]:
        """Rows of the one table whose caption starts so, header first."""
        (found,) = [rows for name, rows in self.tables.items() if name.startswith(start)]
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "whole")


@pytest.fixture(scope="module")
def html(folder) -> str:
    out, _ = build(folder)
    assert out == folder / "report.html"
    return out.read_text()


@pytest.fixture(scope="module")
def page(html) -> Reader:
    return Reader(html)


def test_every_section_is_there_once_and_in_order(page):
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert len(page.ids) == len(set(page.ids)), "identifiers are unique"


def test_nothing_is_loaded_from_elsewhere(html, page):
    assert "http://" not in html and "https://" not in html
    assert all(target.startswith(("#", "data:,")) for target in page.loads)
    assert not {"img", "iframe", "object", "audio", "video"} & set(page.tags)
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)


def test_the_report_is_the_same_when_built_again(folder, html, tmp_path):
    out, _ = build(folder, tmp_path / "again.html")
    assert out.read_text() == html


def test_it_names_the_commands(page):
    for section, command in {
        "kernels": "python -m profiler.sweep",
        "prediction": "python -m cost_models.fit",
        "routing": "python -m reparam.finetune",
        "accuracy": "python -m reparam.finetune --recipe digits-quick",
    }.items():
        assert command in page.text[section]


def test_variant_figures(page):
    header, *rows = page.table("Variants against")
    assert len(rows) == 5
    moe = dict(zip(header, rows[-1]))
    assert moe["top-1 deployed"] == "96.32 % | [95.42, 97.22]"
    assert moe["difference, points"] == "−0.79 | [−1.64, +0.06]"
    assert moe["latency, measured"] == "5.20 ms | [5.12, 5.28]"
    assert moe["fastest original ÷ it"] == "0.596× | [0.572, 0.621]"
    assert moe["energy"].endswith("modelled")
    stage1 = dict(zip(header, rows[1]))
    assert stage1["top-1 deployed"] == "— | not deployed"
    assert stage1["energy"].endswith("measured")
    assert dict(zip(header, rows[0]))["energy"].startswith("— | RAPL is not readable")


def test_kernel_figures(page):
    header, *rows = page.table("Products")
    found = {row[0]: dict(zip(header, row)) for row in rows}
    comparisons = [c for c in compare(measurements()) if c.cache == "hot"]
    assert set(found) == {one.product for one in comparisons}
    for one in comparisons:
        row = found[one.product]
        if one.absent_baselines:
            assert row["winner of all"] == row["fastest baseline"] == "— | torch.bf16 failed"
        else:
            assert row["winner of all"].startswith(one.winner.lowering)
            assert row["fastest baseline"].startswith(one.fastest_baseline.lowering)
        if own := one.own_mult():
            assert row["our mult_int8 or mult_int7 ÷ our shift_int8"].startswith(
                f"{significant(own.ratio.value)}×"
            )
            assert "kB / " in row["weight bytes shift / mult"]
        assert row["does it pay"].startswith(one.verdict[0])


def test_failed_baselines_are_listed_as_failed(page):
    header, *rows = page.table("Each of our lowerings")
    column = header.index("torch.bf16")
    failed = [row for row in rows if "49x320x1280" in row[0]]
    assert failed
    assert all(row[column] == "— | failed: no such instruction on this device" for row in failed)
    _, *every = page.table("Every kernel measurement")
    assert len(every) == sum(row.kind == "primitive" for row in measurements())


def test_fit_figures(page):
    header, *rows = page.table("Held-out errors")
    first = dict(zip(header, rows[0]))
    assert (first["MAPE"], first["MAPE roofline"]) == ("4.2 %", "23.5 %")
    assert first["MAPE inside"] == "3.5 %"
    assert rows[1][header.index("MAPE")] == "— | no held-out row"
    assert rows[1][header.index("MAPE inside")] == "— | none inside"
    assert "3.5 % on the 7 inside" in page.text["prediction"]
    assert "6.0 % on the 3 beyond them" in page.text["verdict"]
    assert page.table("Not modelled")[1] == ["add_kv_pm1 add.tables", "2 rows, 8 needed"]


def test_routing_and_agreement_figures(page):
    header, *rows = page.table("Tokens and latency")
    assert len(rows) == 2 * 6 * 2
    last = dict(zip(header, rows[-1]))
    assert last["share of tokens"] == "49.0 %" and last["share of equal time"] == "52.0 %"
    assert last["latency of all tokens, ms"] == "0.0751"
    assert last["source of the latency"] == "predicted"
    assert {0} == {n for n in range(9) if any(f"examples-{n}" in name for name in page.ids)}
    _, *agreement = page.table("Agreement")
    assert agreement[-1] == ["MoE with the latency loss", "1797", "4", "4", "3.1e-05"]


def test_weights_energy_and_machine_figures(page):
    _, *weights = page.table("Weight bytes of")
    assert weights[2] == ["Add attention, all shift", "322000", "26.7 %"]
    energy = {row[0]: row for row in page.table("Energy of one inference")}
    assert energy["Add attention"][2] == "measured"
    assert energy["MoE with the latency loss"][2] == "modelled"
    machine = dict(page.table("Machine fingerprint"))
    assert machine["fingerprint"] == DEVICE.fingerprint and machine["threads"] == "2"
    assert machine["uuid"].startswith("—")


def test_own_mult_card_is_the_median(page):
    own = median_own_mult(c for c in compare(measurements()) if c.cache == "hot")
    assert f"{significant(own.value)}×" in page.text["verdict"]


def test_hostile_names_are_shown_and_not_run(tmp_path):
    found = results()
    bad = [
        variant.model_copy(
            update={
                "title": f"{HOSTILE} {variant.name}",
                "skipped": {HOSTILE: HOSTILE},
                "energy_reason": HOSTILE,
                "dispatch": [
                    layer.model_copy(
                        update={
                            "layer": f"{HOSTILE}{index}",
                            "share": {"shift $x$": 0.4, "mult<b>": 0.6},
                            "optimal_share": {"shift $x$": 0.5, "mult<b>": 0.5},
                        }
                    )
                    for index, layer in enumerate(variant.dispatch)
                ],
            }
        )
        for variant in found.variants
    ]
    device = DEVICE.model_copy(update={"name": HOSTILE})
    found = found.model_copy(
        update={"variants": bad, "model": HOSTILE, "command": HOSTILE, "device": device}
    )
    rows = [
        row.model_copy(update={"device": device, "run": HOSTILE, "lowering": f"{row.lowering}<i>$"})
        for row in measurements()
    ]
    fit = fit_result().model_copy(update={"skipped": {HOSTILE: HOSTILE}})
    out, _ = build(write_run(tmp_path / "<b>$run$", rows, fit, found))
    text = out.read_text()
    page = Reader(text)
    assert text.count("<script") == 1 and "<script>alert" not in text
    assert not {"b", "i"} & set(page.tags)
    for figure in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "<script" not in figure
    assert "$x$ $\\frac{" in page.text["accuracy"], "dollar signs are written as they are"
    assert page.table("Not modelled")[1] == [HOSTILE, HOSTILE]


@pytest.mark.parametrize("kept", FILES)
def test_a_partial_run_says_what_is_missing(folder, tmp_path, kept):
    shutil.copy(folder / kept, tmp_path / kept)
    result = CliRunner().invoke(app, ["--run", str(tmp_path)])
    assert result.exit_code == 0, result.output
    page = Reader((tmp_path / "report.html").read_text())
    for name in FILES:
        assert (f"{name} is missing" in page.text["verdict"]) == (name != kept)
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", (tmp_path / "report.html").read_text())


def run_cli(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "reports.build", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_empty_folder_is_exit_2_in_one_line(tmp_path):
    result = run_cli("--run", tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert all(name in result.stderr for name in FILES)
    assert list(tmp_path.iterdir()) == []


def test_no_folder_and_bad_out_are_bad_input(folder, tmp_path):
    with pytest.raises(BadInput, match="no such folder"):
        build(tmp_path / "absent")
    with pytest.raises(BadInput, match="is a folder"):
        build(folder, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="--out"):
        build(folder, tmp_path / "file" / "report.html")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{}", b"not ours"])
def test_foreign_files_are_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(name)):
        build(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_broken_row_names_the_store(folder, tmp_path):
    shutil.copy(folder / FILES[0], tmp_path / FILES[0])
    with sqlite3.connect(tmp_path / FILES[0]) as connection:
        connection.execute("UPDATE measurements SET status = 'fine'")
    connection.close()
    with pytest.raises(BadInput, match=r"measurements\.sqlite"):
        build(tmp_path)


def test_another_device_is_pointed_out(folder, tmp_path):
    other = DEVICE.model_copy(update={"threads": 1})
    found = results().model_copy(update={"device": other})
    # Fine-tuning puts rows of its own into the same store.
    whole = Measurement(
        kind="model",
        subject="moe",
        device=other,
        lowering="deployed",
        energy_reason="none",
        latency_ms=5.2,
    )
    write_run(tmp_path, [*measurements(), whole], found=found)
    out, page = build(tmp_path)
    assert "is from another device" in Reader(out.read_text()).text["machine"]
    assert page.cards[4].detail.endswith("not both measured on this device")
    assert "another latency table" in Reader(out.read_text()).text["machine"]


def test_a_large_run_stays_small(tmp_path):
    shapes = [(m, k, n) for m in range(1, 193, 8) for k, n in ((64, 256), (128, 96), (512, 64))]
    rows = measurements(shapes=shapes)
    assert len(rows) > MAX_ROWS
    out, _ = build(write_store(tmp_path, rows))
    assert out.stat().st_size < 3_000_000
    text = Reader(out.read_text()).text["kernels"]
    assert f"The first {MAX_ROWS} of" in text and "24 largest of" in text


def test_rows_without_intervals_or_baselines_are_drawn(tmp_path):
    workload = linear("shift_int8", 8, 16, 32)
    bare = {"latency_low_ms": None, "latency_high_ms": None}
    rows = [primitive_row(workload, "shift.dot", 1.0, **bare)]
    baseline = primitive_row(linear("mult_fp32", 8, 16, 32), "torch.fp32", 2.0, True, **bare)
    for number, some in enumerate((rows, [*rows, baseline])):
        _, page = build(write_store(tmp_path / f"run{number}", some))
        assert page.verdict.status == "undecided"
