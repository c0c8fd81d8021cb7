"""Sections on what `reparam.evaluate` wrote: whole models against PyTorch's, growth with tokens."""

from pathlib import Path

import pytest
from synthetic_run import DEVICE, results

from reparam.results import Interval
from reparam.scaling_result import Scaling, ScalingRow
from reparam.versus_torch_result import Comparison, Contestant, VersusTorch
from reports.build import build
from reports.growth_section import scaling
from reports.key_figures import key_figures
from reports.provenance import machine
from reports.rival_section import rivals
from reports.run_folder import RunFolder, load_run
from reports.verdict import decide

HEADER = {"device": DEVICE, "command": "python -m reparam.evaluate <b>", "created_at": "today"}


def around(value):
    return Interval(value=value, low=0.9 * value, high=1.1 * value)


def versus_torch(ratio=1.5, failed=True):
    ways = [("eager fp32", False, 30.0), ("compile bf16", False, 20.0), ("deployed", True, 10.0)]
    contestants = [
        Contestant(name=name, ours=ours, latency_ms=around(ms)) for name, ours, ms in ways
    ]
    absent = Contestant(name="compile <i>", ours=False, latency_ms=None, reason="needs g++")
    other = absent.model_copy(update={"name": "OpenVINO", "other_runtime": True})
    return VersusTorch(
        **HEADER,
        comparisons=[
            Comparison(
                model="deit",
                batch=8,
                image_size=224,
                contestants=[*contestants, other, *([absent] if failed else [])],
                best_torch="compile bf16",
                speedup={"deployed": around(ratio)},
                speedup_eager={"deployed": around(3.0)},
            )
        ],
    )


def attention_rows():
    rows = []
    for tokens in (256, 1024, 2048, 4096):
        rows.append(("add", tokens, 0.001 * tokens, 1000 * tokens, None))
        rows.append(("softmax", tokens, 1e-6 * tokens**2, 1000 * tokens, None))
    rows.append(("softmax, matrix", 4096, None, None, "is not tried"))
    return [
        ScalingRow(
            way=way,
            tokens=tokens,
            latency_ms=around(ms) if ms else None,
            peak_bytes=peak,
            reason=reason,
        )
        for way, tokens, ms, peak, reason in rows
    ]


def test_whole_models_say_how_much_faster_and_how_sure(tmp_path):
    versus_torch().save(tmp_path / "versus_torch.json")
    section = rivals(load_run(tmp_path))
    assert "deployed is 1.50× as fast as compile bf16" in section.lead[0]
    assert "[1.35, 1.65]" in section.lead[0]
    rows = section.tables[0].rows
    assert [row[0] for row in rows][-1] == "compile <i>" and rows[-1][1].reason == "needs g++"
    assert rows[2][2].value == 1.5 and rows[2][3].value == 3.0
    assert rows[0][2].value is None and "PyTorch's own" in rows[0][2].reason
    assert len(section.pictures[0].data) == 5


def test_growth_has_the_exponents_of_each_way(tmp_path):
    Scaling(**HEADER, heads=3, head_dim=64, rows=attention_rows()).save(tmp_path / "scaling.json")
    section = scaling(load_run(tmp_path))
    assert "add grows with tokens to the power of 1.00" in section.lead[0]
    assert "softmax grows with tokens to the power of 2.00" in section.lead[0]
    assert "matrix" not in section.lead[0]
    assert section.tables[0].rows[-1][2].reason == "is not tried"


def test_evaluations_alone_name_their_device_and_their_files(tmp_path):
    versus_torch().save(tmp_path / "versus_torch.json")
    run = load_run(tmp_path)
    assert run.device == versus_torch().device
    machine_table, files, *_ = machine(run).tables
    assert machine_table.columns[1:] == (run.device.label,)
    assert files.rows[0][:2] == ("versus_torch.json", HEADER["command"])


def test_evaluations_alone_are_a_run_and_markup_in_them_is_text(tmp_path):
    versus_torch().save(tmp_path / "versus_torch.json")
    Scaling(**HEADER, heads=3, head_dim=64, rows=attention_rows()).save(tmp_path / "scaling.json")
    text = build(tmp_path)[0].read_text()
    assert "compile &lt;i&gt;" in text and "compile <i>" not in text
    assert "reparam.evaluate &lt;b&gt;" in text


@pytest.mark.parametrize("section, named", [(rivals, "--versus-torch"), (scaling, "--scaling")])
def test_without_them_the_command_is_named(tmp_path, section, named):
    versus = versus_torch()
    (versus if section is scaling else Scaling(**HEADER, heads=3, head_dim=64, rows=[])).save(
        tmp_path / ("versus_torch.json" if section is scaling else "scaling.json")
    )
    assert named in section(load_run(tmp_path)).missing


@pytest.mark.parametrize(
    "ratio, status, opening",
    [
        (1.5, "mixed", "It is faster here, at an accuracy that was not measured"),
        (0.5, "does not pay", "It does not pay here"),
        (1.0, "undecided", "Not decided here"),
    ],
)
def test_without_training_the_head_of_the_page_is_about_the_whole_model(ratio, status, opening):
    found = versus_torch(ratio, failed=False)
    folder = RunFolder(Path("runs/mine"), None, None, None, None, versus_torch=found)
    verdict = decide(folder)
    assert "PyTorch's fastest here" in verdict.headline
    assert verdict.status == status and verdict.headline.startswith(opening)
    assert "deit, batch 8" in verdict.headline and "compile bf16" in verdict.headline
    assert "digits-quick" not in " ".join(verdict.details)
    card = key_figures(folder)[1]
    assert card.figure == "10.0 ms" and "batch 8; compile bf16 20.0 ms" in card.detail


@pytest.mark.parametrize("ratio, status", [(1.5, "undecided"), (0.5, "does not pay")])
def test_a_win_is_none_while_one_of_pytorchs_ways_did_not_run(ratio, status):
    """A loss stays one; other runtimes are beside the claim."""
    folder = RunFolder(Path("runs/mine"), None, None, None, None, versus_torch=versus_torch(ratio))
    verdict = decide(folder)
    assert verdict.status == status and "PyTorch's fastest here" not in verdict.headline
    assert "not measured: compile <i>: needs g++)" in verdict.headline
    assert "OpenVINO" not in verdict.headline


def test_hints_are_about_the_model_and_the_folder():
    folder = RunFolder(Path("runs/mine"), None, None, None, None, versus_torch=versus_torch())
    assert "--model deit" in folder.commands["measurements.sqlite"]
    assert "RECIPE.toml" in folder.commands["results.json"]
    for name, command in (folder.commands | folder.more_commands).items():
        assert "runs/mine" in command, name
    empty = RunFolder(Path("runs/new"), None, None, None, None)
    assert "digits-quick" in empty.commands["results.json"]


def test_a_page_that_holds_two_models_says_so():
    found = results({"moe": 1.5})
    folder = RunFolder(Path("run"), None, None, found, None, versus_torch=versus_torch())
    verdict = decide(folder)
    assert found.model in verdict.headline and found.data in verdict.headline
    assert any("Other models on this page: deit (versus_torch.json)" in d for d in verdict.details)
