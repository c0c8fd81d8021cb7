"""Every page of docs/ works: its blocks run in order, in an empty folder."""

import importlib
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import typer.main
from examples import blocks

from profiler.console import COMMANDS, available, main

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Tested beside the table that it describes.
ELSEWHERE = {"latency-table.md"}
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name not in ELSEWHERE)
SYSTEM = {"nvidia-smi", "pip", "python", "sudo"}

sys.path.insert(0, str(ROOT / "tests" / "reports"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """What the commands that are only checked would have made, at small."""
    from synthetic_run import latency_table, measurements, write_store

    rows = measurements()
    for name in ("before", "after"):
        bursts = {"bursts_ms": tuple(1 + 0.001 * i for i in range(12))}
        write_store(tmp_path / "runs" / name, [row.model_copy(update=bursts) for row in rows])
    (tmp_path / "runs" / "quick-cpu").mkdir()
    latency_table(rows).save(tmp_path / "runs" / "quick-cpu" / "latency_table.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["shiftadd"])
    return tmp_path


@pytest.fixture
def same_registry():
    """A page that adds a lowering adds it to this process."""
    from kernels.build import LOWERINGS

    before = dict(LOWERINGS)
    yield
    LOWERINGS.clear()
    LOWERINGS.update(before)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs(name, folder, same_registry, capfd):
    names: dict = {"__name__": "example"}
    for block in blocks(DOCS / name):
        where = f"docs/{name}, line {block.line}"
        if block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "toml":
            (folder / block.note).write_text(block.text)
        elif block.language == "sh" and block.note != "checked":
            for program, *arguments in block.commands:
                assert program == "shiftadd", where
                _run(arguments, where)


def _run(arguments: list[str], where: str) -> None:
    try:
        main(arguments)
    except SystemExit as done:
        assert not done.code, f"{where}: {' '.join(arguments)}: exit {done.code}"


def _options(command: str) -> set[str]:
    module = importlib.import_module(COMMANDS[command][0])
    commands = [typer.main.get_command(module.app)]
    commands += list(getattr(commands[0], "commands", {}).values())
    return {option for one in commands for parameter in one.params for option in parameter.opts}


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    text = (DOCS / name).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (DOCS / target).exists(), target
    for block in blocks(DOCS / name):
        assert block.language in ("sh", "python", "toml", "yaml"), f"line {block.line}"
        for program, *arguments in block.commands if block.language == "sh" else ():
            where = f"docs/{name}, line {block.line}"
            if program == "make":
                assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(), where
            elif program == "shiftadd":
                command, *given = arguments
                if command not in available():
                    pytest.skip(f"{where}: shiftadd {command} is not in this version")
                used = {word for word in given if word.startswith("--")}
                assert used <= _options(command), where
            else:
                assert program in SYSTEM, where


def test_every_page_is_in_the_table_of_contents():
    contents = (DOCS / "README.md").read_text()
    assert all(name in contents for name in PAGES if name != "README.md")


def test_running_a_command_by_name_is_running_its_module(monkeypatch):
    ran = []
    monkeypatch.setattr(runpy, "run_module", lambda module, **how: ran.append((module, how)))
    main(["report", "--run", "x"])
    assert ran == [("reports.build", {"run_name": "__main__", "alter_sys": True})]
    assert sys.argv == ["shiftadd report", "--run", "x"]


def test_the_recipe_of_the_page_is_one():
    from reparam.recipe import Recipe

    written = {b.note: b.text for b in blocks(DOCS / "convert-and-fine-tune.md")}
    content = tomllib.loads(written["mine.toml"])
    recipe = Recipe.model_validate(content)
    assert recipe.data == "folder" and recipe.model.pretrained and recipe.pretrain
    content |= tomllib.loads(written["experts.toml"])
    content["model"] |= tomllib.loads(written["weights.toml"])
    own = Recipe.model_validate(content | {"attention": "quadratic"})
    assert own.model.kwargs["pretrained_cfg_overlay"]["num_classes"] == 10
    content["variants"][0] |= tomllib.loads(written["budget.toml"])
    assert Recipe.model_validate(content).variants[0].latency_budget_ms == 12.5
