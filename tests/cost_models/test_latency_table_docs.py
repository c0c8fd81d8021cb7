"""The examples of docs/latency-table.md run as they stand."""

import re
from pathlib import Path

import pytest

from cost_models.entry import Entry
from cost_models.latency_table import LatencyTable
from cost_models.shipped_tables import SHIPPED

TEXT = (Path(__file__).parents[2] / "docs" / "latency-table.md").read_text()


@pytest.mark.skipif(not SHIPPED, reason="no table ships yet")
def test_the_python_examples_run_in_order():
    known = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(compile(block, "docs/latency-table.md", "exec"), known)
    assert known["latency_ms"] > 0
    assert (known["router"].weight.grad != 0).any()
    assert known["advice"].decisions


def test_every_field_is_documented():
    for name in LatencyTable.model_fields:
        assert f"`{name}" in TEXT, name
    for name in Entry.model_fields:
        assert f".{name}`" in TEXT, name
