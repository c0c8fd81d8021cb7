"""The command; the decisions themselves are tested in test_advice.py."""

import json

import pytest
from typer.testing import CliRunner

from cost_models import advise as command
from cost_models.advice_result import Advice
from cost_models.fit import fit
from cost_models.latency_table import TableError
from kernels.workload import linear

MODEL = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def table_path(tmp_path_factory, measure, law):
    """A table of the linears of a model: int8 shift at four times the speed of torch."""
    shapes = [(192, 576), (192, 192), (192, 768), (768, 192), (64, 64), (256, 256)]
    rows = []
    for m in (49, 100, 197, 394, 788):
        for k, n in shapes:
            for form in ("mult_fp32", "mult_bf16", "mult_int8"):
                w = linear(form, m, k, n)
                rows.append(measure(w, law(w), f"torch.{form}", is_baseline=True))
            for form in ("mult_int8", "shift_int8"):
                w = linear(form, m, k, n)
                rows.append(measure(w, law(w, 4.0) / 4, "ours.dot"))
    path = tmp_path_factory.mktemp("table") / "latency_table.json"
    fit(rows, "store")[0].save(path)
    return path


def run(*arguments):
    return CliRunner().invoke(command.app, ["--model", MODEL, *arguments])


def test_the_answer_for_machines_is_the_schema_and_says_what_to_convert(table_path, tmp_path):
    said = run("--table", str(table_path), "--json", "--out", str(tmp_path))
    assert said.exit_code == 0
    advice = Advice.model_validate_json(said.output)
    assert advice == Advice.load(tmp_path / "advice.json")
    assert advice.verdict == "pays"
    assert advice.convert == {
        f"blocks.{i}.{name}": "shift_int8"
        for i in range(12)
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    assert advice.totals.saved_ms.low > 0
    assert advice.totals.weight_bytes < 0.3 * advice.totals.fp32_weight_bytes
    attention = [one for one in advice.decisions if one.rule == "attention"]
    assert {one.verdict for one in attention} == {"unknown"} and len(attention) == 12
    assert any(f"--model {MODEL}" in line for line in advice.measure)


def test_the_answer_for_people_starts_with_the_layers_and_gives_the_verdict(table_path):
    said = run("--table", str(table_path))
    assert said.exit_code == 0
    assert f"pays: {MODEL} at batch 1" in said.output
    assert "latency saved" in said.output and "modelled" in said.output


@pytest.mark.parametrize(("gate", "code"), [((), 0), (("--gate",), 1)])
def test_an_answer_exits_with_0_unless_it_is_a_gate(table_path, monkeypatch, gate, code):
    against = lambda *arguments: Advice(  # noqa: E731
        model=MODEL, batch=1, device=None, table=None, table_sha256=None, strict=False,
        verdict="does not pay", reason="convert none",
    )  # fmt: skip
    monkeypatch.setattr(command, "with_table", against)
    assert run("--table", str(table_path), *gate).exit_code == code


def test_without_a_table_it_says_which_sweep_to_run_and_how_long(monkeypatch):
    monkeypatch.setattr(command, "shipped_for", lambda device: None)
    said = run("--batch", "4")
    assert said.exit_code == 0
    assert "unknown" in said.output and "minutes" in said.output
    assert f"python -m profiler.sweep --model {MODEL} --batch 4" in said.output


def test_a_table_that_is_not_there_is_one_line_that_says_how_to_make_it():
    said = run("--table", "nosuch")
    assert isinstance(said.exception, TableError) and said.output == ""
    text = str(said.exception)
    assert text.startswith("nosuch: ") and "\n" not in text
    assert f"profiler.sweep --model {MODEL}" in text and "minutes" in text


def test_a_table_that_cannot_be_read_is_not_called_missing(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for name in ("n" * 300, str(tmp_path / "other.json")):
        said = run("--table", name)
        assert isinstance(said.exception, TableError)
        assert "to make one" not in str(said.exception)


def test_bad_options_are_refused(table_path):
    from profiler.command_line import BadInput

    assert isinstance(run("--table", str(table_path), "--forms", "shift_x").exception, BadInput)
    assert json.loads(run("--table", str(table_path), "--forms", "shift_fp32", "--json").output)[
        "decisions"
    ][1]["form"] in (None, "shift_fp32")
