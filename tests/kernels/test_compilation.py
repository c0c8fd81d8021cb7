"""Compiled programs are kept from process to process, and only what is the same is taken."""

import os
import subprocess
import sys

import pytest
import torch
import tvm

import kernels.compilation
from kernels.build import LOWERINGS, arguments, best_schedule
from kernels.compilation import FOLDER_VARIABLE, kept_programs, runnable
from kernels.reference import max_abs_error, random_operands
from kernels.targets import cpu_target
from kernels.workload import linear

WORKLOAD = linear("shift_int4", 5, 24, 40)


def _program(form="shift_int4", k=24):
    workload, target = linear(form, 5, k, 40), cpu_target()
    name = {"shift_int4": "shift.nibbles", "mult_fp32": "mult.panels"}[form]
    schedule = best_schedule(workload, name, target)
    return LOWERINGS[name].define(workload.family, target, schedule), target


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "kept"))
    kernels.compilation._make_room.cache_clear()
    kernels.compilation._warn_once.cache_clear()
    return tmp_path / "kept"


@pytest.fixture
def compilations(monkeypatch):
    """Counts them."""
    counted, compile_program = [], kernels.compilation.compile_program

    def counting(*args):
        counted.append(args)
        return compile_program(*args)

    monkeypatch.setattr(kernels.compilation, "compile_program", counting)
    return counted


def test_another_process_finds_what_one_has_compiled(folder):
    code = """
import kernels.compilation, torch
from kernels.build import build
from kernels.reference import random_operands
from kernels.workload import linear
counted, compile_program = [], kernels.compilation.compile_program
kernels.compilation.compile_program = lambda *a: counted.append(a) or compile_program(*a)
workload = linear("shift_int4", 5, 24, 40)
out = build(workload)(random_operands(workload, seed=3))
print(len(counted), out.double().sum().item().hex())
"""
    workload = linear("shift_int4", 5, 24, 40)
    operands = random_operands(workload, seed=3)
    out = operands.x.new_empty(5, 40)
    runnable(*_program())(*arguments(operands), out)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", out.double().sum().item().hex()]
    assert len(list(folder.iterdir())) == 1


def test_what_is_kept_computes_what_was_compiled(folder, compilations):
    operands = random_operands(WORKLOAD, seed=1)
    results = []
    for _ in range(2):
        out = torch.empty(5, 40)
        runnable(*_program())(*arguments(operands), out)
        results.append(out)
    assert len(compilations) == 1
    assert torch.equal(*results)
    assert max_abs_error(WORKLOAD, operands, results[0])[1]


def test_another_program_target_or_compiler_is_compiled(folder, compilations, monkeypatch):
    # One that asks for no instruction of this CPU's own: another target may lack it.
    function, target = _program("mult_fp32")
    runnable(function, target)
    runnable(*_program("mult_fp32", k=28))
    runnable(*_program())
    runnable(function, cpu_target("x86-64-v3"))
    monkeypatch.setattr(kernels.compilation, "_compiler", lambda: "TVM 1.0")
    runnable(function, target)
    assert len(compilations) == len(list(folder.glob("*.so"))) == 5


def test_what_is_no_library_is_compiled_again(folder, compilations):
    folder.mkdir()
    library = folder / f"{kernels.compilation._identity(*_program())}.so"
    library.touch()
    assert callable(runnable(*_program()))
    assert len(compilations) == 1
    assert library.stat().st_size > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named_once(folder):
    folder.mkdir(mode=0o500)
    with pytest.warns(UserWarning, match="compiled kernels are not kept: .*kept"):
        assert callable(runnable(*_program()))


def test_a_place_that_cannot_be_a_folder_is_named_once(tmp_path, monkeypatch, recwarn):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "file"))
    kernels.compilation._warn_once.cache_clear()
    for _ in range(2):
        assert callable(runnable(*_program()))
    (warning,) = recwarn.list
    assert "compiled kernels are not kept" in str(warning.message)
    assert str(tmp_path / "file") in str(warning.message)


def test_nothing_is_kept_where_that_is_not_wanted(monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, "off")
    assert kept_programs() is None
    assert callable(runnable(*_program()))


def test_nothing_is_kept_without_a_linker(monkeypatch, folder):
    monkeypatch.setattr(kernels.compilation, "get_cc", lambda: None)
    assert callable(runnable(*_program()))
    assert not folder.exists()


def test_a_compilation_that_fails_leaves_nothing(folder, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tvm.runtime.Executable, "export_library", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runnable(*_program())
    assert list(folder.iterdir()) == []


def test_what_was_not_used_for_longest_makes_room(folder, monkeypatch):
    used, unused = (
        folder / f"{kernels.compilation._identity(*_program(k=k))}.so" for k in (24, 28)
    )
    for k in (24, 28):
        runnable(*_program(k=k))
    os.utime(used, (1, 1))
    os.utime(unused, (2, 2))
    runnable(*_program(k=24))
    monkeypatch.setattr(kernels.compilation, "LARGEST_BYTES", used.stat().st_size + 1)
    kernels.compilation._make_room.cache_clear()
    runnable(*_program(k=32))
    assert used.exists() and not unused.exists()
