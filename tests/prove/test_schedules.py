import pytest
from schedules import app, geometric_mean, schedule_of

from kernels.build import LOWERINGS
from kernels.targets import cpu_target
from kernels.workload import linear
from profiler.command_line import BadInput, run

SHAPES = """
forms = ["mult_fp32"]
[[shapes]]
m = [5, 9]
k = 8
n = 300
[[shapes]]
m = [5, 9]
k = 8
n = 32
"""


def test_a_geometric_mean_treats_twice_and_half_alike():
    mean = geometric_mean([2.0, 0.5, 2.0, 0.5])
    assert mean.value == pytest.approx(1) and mean.low == pytest.approx(1 / mean.high)
    assert geometric_mean([1.5]) is None


def test_what_is_no_schedule_is_refused():
    assert schedule_of("tile_rows=3,panels_outer=0") == {"tile_rows": 3, "panels_outer": 0}
    with pytest.raises(BadInput, match="--against"):
        schedule_of("tile_rows")


def test_both_sides_are_measured_in_turns(tmp_path, capsys, monkeypatch):
    (tmp_path / "few.toml").write_text(SHAPES)
    default = LOWERINGS["mult.panels"].default_schedule(linear("mult_fp32", 5, 8, 32), cpu_target())
    against = f"tile_rows={default['tile_rows']}"
    arguments = ["--lowerings", "mult.panels", "--against", against, "--shapes", "2"]
    monkeypatch.setattr("sys.argv", ["x", *arguments, "--config", str(tmp_path / "few.toml")])
    with pytest.raises(SystemExit) as stopped:
        run(app)
    printed = capsys.readouterr().out
    # A schedule against itself, on shapes of microseconds: not which of the two is faster.
    assert stopped.value.code in (0, 1)
    assert printed.count("mult.panels") == 4
    assert "more than 256 outputs" in printed and "up to 256 outputs" in printed
