import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from profiler.console import COMMANDS, available, main, usage


def test_every_command_that_is_listed_has_a_main_program():
    for name, (module, purpose) in available().items():
        text = Path(find_spec(module).origin).read_text()
        assert '__name__ == "__main__"' in text, f"{name}: {module} cannot be run"
        assert f"  {name} " in usage() and purpose in usage()


def test_the_list_is_what_no_argument_and_help_print(capsys):
    for arguments in ([], ["--help"], ["-h"]):
        main(arguments)
        assert capsys.readouterr().out.strip() == usage()


def test_an_unknown_command_is_one_line_and_exit_2(capsys):
    with pytest.raises(SystemExit) as found:
        main(["sweeep"])
    assert found.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and "sweeep" in error and "sweep, tune" in error


def test_listing_imports_none_of_them():
    code = "import profiler.console as c, sys; c.main(['--help']);" + "".join(
        f"assert {module!r} not in sys.modules;" for module, _ in COMMANDS.values()
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_arguments_and_exit_code_are_those_of_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shiftadd"])
    with pytest.raises(SystemExit) as found:
        main(["report", "--run", str(tmp_path)])
    assert found.value.code == 2
    assert "holds none of" in capsys.readouterr().err
    with pytest.raises(SystemExit) as found:
        main(["report", "--help"])
    assert not found.value.code and "--run" in capsys.readouterr().out
