import csv
import importlib.util
import io
from pathlib import Path

import pytest
from browser import Tab, chromium
from synthetic_run import write_run

from reports.build import build

PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out, _ = build(write_run(tmp_path_factory.mktemp("run") / "whole"))
    return out


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_it_loads_from_disk_alone_and_fits(tab: Tab, report, width):
    tab.problems.clear()
    tab.requests.clear()
    seconds = tab.open(report, width)
    print(f"{width} px: interactive after {seconds:.2f} s")
    assert tab.problems == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [report.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("document.querySelectorAll('[data-row]').length") > 50


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_pointing_at_a_mark_shows_its_row(tab: Tab, report, width):
    tab.open(report, width)
    chart = f"#figure-accuracy .chart.{'narrow' if width == PHONE else 'wide'}"
    mark = f"{chart} .marks [data-row='2']"
    tab.point_at(mark)
    shown = tab.evaluate("document.getElementById('tip').innerText")
    assert "Add attention, all shift" in shown and "95.20" in shown and "4.400" in shown
    tab.evaluate(f"document.querySelector({chart!r}).focus()")
    for _ in range(2):
        for kind in ("rawKeyDown", "keyUp"):
            tab.call(
                "Input.dispatchKeyEvent", type=kind, key="ArrowRight", windowsVirtualKeyCode=39
            )
    assert not tab.evaluate("document.getElementById('tip').hidden")
    assert tab.evaluate("document.getElementById('said').textContent")


def _table(tab: Tab, caption: str) -> str:
    """Opens a table and returns an expression for its element."""
    found = (
        "[...document.querySelectorAll('details.table')].find((d) => "
        f"d.querySelector('summary').textContent.startsWith({caption!r}))"
    )
    tab.evaluate(f"void ({found}.open = true)")
    return found


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_tables_sort_and_filter(tab: Tab, report, width):
    tab.open(report, width)
    found = _table(tab, "Every kernel measurement")
    column = "[...{0}.querySelectorAll('th')].findIndex((h) => h.textContent === 'latency_ms')"
    head = f"{found}.querySelectorAll('th')[{column.format(found)}]"
    values = (
        f"[...{found}.querySelectorAll('tbody tr:not([hidden])')].map("
        f"(r) => r.cells[{column.format(found)}].dataset.value ?? null)"
    )
    for state, descending in (("ascending", False), ("descending", True)):
        tab.evaluate(f"{head}.querySelector('button').click()")
        assert tab.evaluate(f"{head}.getAttribute('aria-sort')") == state
        order = tab.evaluate(values)
        figures = [float(value) for value in order if value is not None]
        assert figures == sorted(figures, reverse=descending) and len(figures) > 30
        assert None not in order[: len(figures)], "missing figures stay last"
    tab.evaluate(
        f"(() => {{ const f = {found}.querySelector('input'); f.value = 'shift.dot 784x512';"
        "f.dispatchEvent(new Event('input')); })()"
    )
    rows = tab.evaluate(
        f"[...{found}.querySelectorAll('tbody tr:not([hidden])')].map((r) => r.textContent)"
    )
    assert len(rows) == 1 and "shift.dot" in rows[0] and "784x512x64" in rows[0]


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_figures_are_copied_as_csv(tab: Tab, report, width):
    tab.open(report, width)
    tab.call("Browser.grantPermissions", permissions=["clipboardReadWrite"])
    found = _table(tab, "Figures of “Top-1 over measured latency”")
    tab.evaluate(f"{found}.querySelector('.copy').click()")
    tab.evaluate("new Promise((done) => setTimeout(done, 50))")
    copied = list(csv.DictReader(io.StringIO(tab.evaluate("navigator.clipboard.readText()"))))
    assert [row["variant"] for row in copied][:2] == ["Original", "Add attention"]
    assert float(copied[2]["latency_ms"]) == 4.4 and float(copied[2]["top1_low"]) == 94.3


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_no_accessibility_rule_of_level_a_or_aa_is_broken(tab: Tab, report, width, dark):
    package = importlib.util.find_spec("axe_core_python")
    if package is None or not package.submodule_search_locations:
        pytest.skip("axe-core-python is not installed")
    rules = Path(package.submodule_search_locations[0]) / "axe.min.js"
    tab.open(report, width, dark=dark)
    # What is closed is not checked; further rows of a table are as its first ones.
    tab.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    tab.evaluate("document.querySelectorAll('tr:nth-child(n + 6)').forEach((r) => r.remove())")
    tab.evaluate(f"{rules.read_text()}; 0")
    found = tab.evaluate(
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']}).then((r) => "
        "({passed: r.passes.length, broken: r.violations.map((v) => "
        "v.id + ': ' + v.nodes.slice(0, 3).map((n) => n.html.slice(0, 200)).join(' | '))}))"
    )
    scheme = "dark" if dark else "light"
    print(f"{width} px, {scheme}: {found['passed']} rules pass, {len(found['broken'])} broken")
    assert found["broken"] == []
    assert found["passed"] > 15
