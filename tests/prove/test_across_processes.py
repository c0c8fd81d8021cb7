import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def _said(*arguments):
    command = [sys.executable, HERE / "across_processes.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_each_checkout_has_processes_of_its_own_in_turns():
    checkout = str(HERE.parents[1])
    done = _said(
        "--shape", "8x16x32", "--around", "residual", "--processes", "2", "--beside", checkout
    )
    assert done.returncode == 0, done.stderr
    for name in ("this", "beside"):
        line = next(line for line in done.stdout.splitlines() if f" {name}: " in line)
        figures = re.search(r": ([\d. ]*)µs", line)[1].split()
        contended = re.search(r"(\d+) contended", line)
        assert len(figures) + int(contended[1] if contended else 0) == 2
        assert all(float(figure) > 0 for figure in figures)


def test_bad_input_gets_a_line():
    for arguments, named in (
        (("--shape", "8x16"), "--shape 8x16"),
        (("--shape", "8x16x32", "--beside", "/nowhere"), "--beside /nowhere"),
        (("--shape", "8x16x32", "--form", "none"), "none"),
    ):
        done = _said(*arguments)
        assert done.returncode == 2 and named in done.stderr
        assert "Traceback" not in done.stderr
