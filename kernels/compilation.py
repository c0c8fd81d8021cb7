"""A program of TIR -> what can be launched, compiled once a machine and not once a process.

A deployed model is some thirty kernels, which take ten to twenty seconds to compile. Linked, they
are kept in a folder, by what they were compiled from; a process that finds them there loads them in
a millisecond each. ``SHIFTADD_KERNEL_CACHE`` names another folder, or ``off``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import tvm
from platformdirs import user_cache_path
from tvm import tirx
from tvm.support.cc import get_cc
from tvm.target import codegen

from kernels.cuda_compiler import cuda_compiler
from kernels.targets import KernelTarget

FOLDER_VARIABLE = "SHIFTADD_KERNEL_CACHE"
# Some ten thousand kernels: those of a long tuning run.
LARGEST_BYTES = 2**29

# Storage rewriting would forget which arrays belong on the stack (kernels.lowerings.emit.local).
_CPU_CONFIG = {"tirx.disable_storage_rewrite": True}


def compile_program(function: tirx.PrimFunc, target: KernelTarget) -> tvm.runtime.Executable:
    """Compiles one function ``main``, for any target: also one that this machine cannot run."""
    config = _CPU_CONFIG if target.name == "llvm" else {}
    with cuda_compiler(), tvm.transform.PassContext(config=config):
        return tvm.compile(tvm.IRModule({"main": function}), target=target.tvm)


def runnable(function: tirx.PrimFunc, target: KernelTarget) -> Callable[..., None]:
    """A program of this machine's CPU, from the folder of kept ones or compiled and put there.

    Where nothing can be kept (no linker, no room, no permission) it is compiled for this process
    alone.
    """
    folder = kept_programs()
    if folder is None:
        return compile_program(function, target)["main"]
    library = folder / f"{_identity(function, target)}.so"
    with suppress(ValueError, RuntimeError):  # absent, or of no machine of this kind
        main = tvm.runtime.load_module(str(library))["main"]
        with suppress(OSError):  # a folder that others filled may be read only
            os.utime(library)
        return main
    program = compile_program(function, target)
    try:
        _keep(program, library)
        return tvm.runtime.load_module(str(library))["main"]
    except (OSError, RuntimeError, ValueError) as error:
        _warn_once(f"compiled kernels are not kept: {error}")
        return program["main"]


def kept_programs() -> Path | None:
    """The folder of compiled programs; None where none are kept."""
    wanted = os.environ.get(FOLDER_VARIABLE)
    if wanted == "off" or get_cc() is None:
        return None
    return Path(wanted) if wanted else user_cache_path("shiftadd") / "kernels"


def _identity(function: tirx.PrimFunc, target: KernelTarget) -> str:
    """All that decides what is compiled: the program, the target, and who compiles."""
    parts = (tvm.ir.save_json(function), str(target.tvm), repr(_CPU_CONFIG), _compiler())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@functools.cache
def _compiler() -> str:
    ours = " ".join(f"{name} {version(name)}" for name in ("apache-tvm", "apache-tvm-ffi"))
    return f"{ours} LLVM {codegen.llvm_version_major()} {codegen.llvm_get_system_triple()}"


def _keep(program: tvm.runtime.Executable, library: Path) -> None:
    """Whole or not at all: other processes may load it or write the same at any time."""
    library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_room(library.parent)
    handle, name = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    fresh = Path(name)
    try:
        program.export_library(name)
        with fresh.open("rb") as written:
            os.fsync(written.fileno())  # half a library would end the process that loads it
        fresh.replace(library)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@functools.cache
def _make_room(folder: Path) -> None:
    """Once a process: what has not been used for longest goes first."""
    found = []
    for path in folder.glob("*.so"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_mtime, path.stat().st_size, path))
    room = LARGEST_BYTES
    for _, size, path in sorted(found, reverse=True):
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
