from typing import Annotated

import pytest
import typer
from pydantic import BaseModel, ConfigDict, ValidationError

from kernels.workload import WorkloadError
from profiler.command_line import BadInput, explain, load_config, output_folder, run, shipped
from profiler.device import DeviceError
from profiler.store import StoreError


class OwnError(ValueError):
    pass


ERRORS = {
    "input": BadInput("sweep.toml: shapes:\n  is missing"),
    "workload": WorkloadError("m", "must be at least 1"),
    "device": DeviceError("--threads: 9 is too many"),
    "store": StoreError("x.sqlite: no such store"),
    "own": OwnError("mine"),
    "verdict": typer.Exit(1),
    "interrupt": KeyboardInterrupt(),
    "bug": RuntimeError("a bug"),
}
app = typer.Typer(add_completion=False)


@app.command()
def main(what: str, times: Annotated[int, typer.Option(min=1)] = 1) -> None:
    if what in ERRORS:
        raise ERRORS[what]
    print(what)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command above: its exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["command", *arguments])
        with pytest.raises(SystemExit) as exit_:
            run(app, errors=(OwnError,))
        return exit_.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    "what, message",
    [
        ("input", "error: sweep.toml: shapes: is missing\n"),
        ("workload", "error: m: must be at least 1\n"),
        ("device", "error: --threads: 9 is too many\n"),
        ("store", "error: x.sqlite: no such store\n"),
        ("own", "error: mine\n"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(command, what, message):
    assert command(what) == (2, "", message)


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["x", "--nope"], "--nope"),
        ([], "what"),
        (["x", "--times", "many"], "--times"),
        (["x", "--times", "0"], "--times"),
        (["x", "y"], "y"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_2(command, arguments, named):
    code, out, errors = command(*arguments)
    assert (code, out) == (2, "")
    assert named in errors.lower()
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_success_a_verdict_and_an_interruption_have_their_codes(command):
    assert command("fine") == (0, "fine\n", "")
    assert command("verdict") == (1, "", "")
    assert command("interrupt") == (130, "", "interrupted; run the same command again to go on\n")


def test_a_bug_of_ours_is_not_called_bad_input(monkeypatch):
    monkeypatch.setattr("sys.argv", ["command", "bug"])
    with pytest.raises(RuntimeError, match="a bug"):
        run(app)


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    shapes: list[int]
    name: str = ""


@pytest.fixture
def folder(tmp_path):
    shipped_folder = tmp_path / "shipped"
    shipped_folder.mkdir()
    (shipped_folder / "quick.toml").write_text("shapes = [1, 2]\n")
    (shipped_folder / "big.toml").write_text("shapes = [3]\n")
    (shipped_folder / "notes.txt").write_text("")
    return shipped_folder


def test_shipped_configs_by_name_and_any_by_path(folder, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('shapes = [7]\nname = "mine"\n')
    assert shipped(folder) == ["big", "quick"]
    assert load_config("quick", folder, Settings) == ("quick", Settings(shapes=[1, 2]))
    assert load_config(str(own), folder, Settings) == ("own", Settings(shapes=[7], name="mine"))


@pytest.mark.parametrize(
    "content, named",
    [
        (b"", "shapes: Field required"),
        (b"shapes = [1]\nshape = 3\n", "shape: Extra inputs"),
        (b'shapes = ["a", "b"]\n', r"shapes\.0: .*\(and 1 more\)"),
        (b"shapes = [1", "is no TOML"),
        (b"\xff\xfe\x00", "is no TOML"),
    ],
)
def test_a_bad_config_names_file_and_key(folder, tmp_path, content, named):
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=rf"bad\.toml: .*{named}"):
        load_config(str(path), folder, Settings)


def test_an_absent_config_says_what_ships(folder, tmp_path):
    with pytest.raises(BadInput, match=r"nope: no such file; shipped: big, quick"):
        load_config("nope", folder, Settings)
    with pytest.raises(BadInput, match="no such file"):
        load_config(str(tmp_path), folder, Settings)


def test_explain_names_the_first_key():
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"shapes": 3})
    assert explain(caught.value).startswith("shapes: ")


def test_output_folder_is_made_once_and_refused_where_it_cannot_be(tmp_path):
    made = output_folder(tmp_path / "runs" / "quick")
    assert made.is_dir()
    assert output_folder(made) == made
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match=r"--out .*file.*: cannot be written"):
            output_folder(where)
