"""Runs CUDA kernels without a GPU: TVM's text, compiled for this CPU, under TVM's own host code.

It shows the arithmetic of the text and what it reads and writes: neither its speed, nor what a
GPU's memory does with threads that run at once. Only for tests.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import tvm
import tvm_ffi
from torch import Tensor
from tvm_ffi import libinfo

import kernels.build

_HERE = Path(__file__).parent
_CUDA_DEVICE = 2


def missing() -> str | None:
    """Why nothing can be emulated here, if so."""
    if shutil.which("g++") is None:
        return "g++ is absent: CUDA text cannot be compiled for this CPU"
    if torch.cuda.is_available():
        return "a GPU is here: see test_cuda_device"
    return None


def _stand_in() -> object:
    """TVM's interface to a CUDA device: that of the CPU."""
    return tvm.get_global_func("device_api.cpu")()


@contextmanager
def emulation() -> Iterator[None]:
    """Within it ``kernels.build.build`` makes emulated kernels of CUDA lowerings."""
    if tvm.get_global_func("device_api.cuda", allow_missing=True) is None:
        tvm.register_global_func("device_api.cuda", _stand_in)
    tvm_build = sys.modules["tvm.tirx.build"]
    generate, compiled = tvm_build.codegen_build, kernels.build.compiled

    def emulate(mod: tvm.IRModule, target: tvm.target.Target) -> object:
        generated = generate(mod, target)
        if target.kind.name != "cuda":
            return generated
        axes = {
            str(function.attrs["global_symbol"]): [
                str(axis) for axis in function.attrs["tirx.kernel_launch_params"]
            ]
            for function in mod.functions.values()
        }
        return _compiled_for_cpu(generated.inspect_source(), axes)

    def on_host_memory(*args: object) -> dict[str, Callable]:
        return {"main": launcher(compiled(*args)["main"])}

    with (
        patch.object(tvm_build, "codegen_build", emulate),
        patch.object(kernels.build, "_compiled", cache(kernels.build._compiled.__wrapped__)),
        patch.object(kernels.build, "compiled", on_host_memory),
    ):
        yield


def _compiled_for_cpu(text: str, axes: dict[str, list[str]]) -> tvm_ffi.Module:
    """The kernels as functions with the names under which TVM's host code looks them up."""
    # What TVM puts in front is emulated_cuda.h's part.
    text = text[re.search(r"^(__forceinline__|extern)", text, re.MULTILINE).start() :]
    text = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 __shared__", text)
    # asm volatile("op.type {%0, %1}, …;" : "=r"(a) : "r"(b)) -> ptx_op_type(a, b)
    text = re.sub(
        r'asm volatile\("([\w.]+) [^"]*"\s*:([^;]*)\);',
        lambda found: (
            f"ptx_{found[1].replace('.', '_')}({', '.join(re.findall(r'[(](.*?)[)]', found[2]))});"
        ),
        text,
    )
    for name, tags in axes.items():
        members = ", ".join(f"&dim3::{tag[-1]}" for tag in tags)
        in_block = ", ".join(str(int(tag.startswith("threadIdx"))) for tag in tags)
        text += f"""
extern "C" int __tvm_ffi_{name}(void*, const TVMFFIAny* values, int32_t, TVMFFIAny* result) {{
  result->type_index = kTVMFFINone;
  return emulated::launch({name}, values, {{{members}}}, {{{in_block}}});
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cc"), Path(folder, "kernel.so")
        source.write_text(f'#include "emulated_cuda.h"\n{text}')
        includes = [_HERE, libinfo.find_include_path(), libinfo.find_dlpack_include_path()]
        flags = ["-std=c++20", "-O0", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
        command = ["g++", *flags, "-shared", "-fPIC", *(f"-I{path}" for path in includes)]
        command += [str(source), libinfo.find_libtvm_ffi(), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return tvm_ffi.load_module(str(library))


def launcher(main: Callable) -> Callable[..., None]:
    """Runs on copies that end where readable memory ends, and copies the results back."""

    def launch(*tensors: Tensor) -> None:
        copies: dict[int, Tensor] = {}
        views = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in copies:
                copies[storage.data_ptr()] = _guarded(storage)
            copy = copies[storage.data_ptr()].view(tensor.dtype)
            first = copy.storage_offset() + tensor.storage_offset()
            views.append(copy.as_strided(tensor.shape, tensor.stride(), first))
        main(*(_OnDevice(view) for view in views))
        for tensor, view in zip(tensors, views):
            tensor.copy_(view)

    return launch


def _guarded(storage: torch.UntypedStorage) -> Tensor:
    """A copy at 16 bytes' alignment before a page that cannot be read."""
    size, page = storage.nbytes(), mmap.PAGESIZE
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    library = ctypes.CDLL(None)
    assert library.mprotect(ctypes.c_void_p(start + room), page, 0) == 0
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=room)
    copy = copy[(room - size) // 16 * 16 :][:size]
    copy.copy_(torch.tensor([], dtype=torch.uint8).set_(storage))
    return copy


class _OnDevice:
    """A tensor of host memory that says it were on a GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: object) -> object:
        capsule = torch.utils.dlpack.to_dlpack(self.tensor)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        address = pointer(capsule, b"dltensor")
        # DLTensor begins with the data pointer, then the type of the device.
        ctypes.c_int32.from_address(address + ctypes.sizeof(ctypes.c_void_p)).value = _CUDA_DEVICE
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA_DEVICE, 0)
