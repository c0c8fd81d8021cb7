"""Runs kernels for 64-bit Arm on any machine: TVM's object code, in an emulator of the CPU.

It shows their arithmetic, and stops them where they read or write beyond a tensor's memory; it does
not show their speed. Only for tests.
"""

from __future__ import annotations

import io
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import tvm
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from torch import Tensor
from tvm import tirx
from unicorn import UC_ARCH_ARM64, UC_HOOK_CODE, UC_MODE_ARM, Uc
from unicorn.arm64_const import (
    UC_ARM64_REG_CPACR_EL1,
    UC_ARM64_REG_LR,
    UC_ARM64_REG_PC,
    UC_ARM64_REG_SP,
    UC_ARM64_REG_X0,
    UC_ARM64_REG_X1,
    UC_ARM64_REG_X2,
    UC_ARM64_REG_X3,
    UC_CPU_ARM64_MAX,
)

import kernels.expert_ops
import kernels.layer_kernels
from kernels.compilation import compile_program
from kernels.targets import KernelTarget

# Memory of the emulated machine: where each part begins, and how large it is. Nothing lies
# between. Stubs, addresses at which a function is called that the kernel lacks, a call must reach.
_CODE, _STUBS, _STACK, _DATA = 0x10000000, 0x15000000, 0x20000000, 0x30000000
_SIZE, _ALIGN = 1 << 26, 64
# Tensors lie here, each up to the end of its pages, with a page of nothing behind.
_TENSORS, _PAGE = 0x50000000, 4096
# Tasks that a parallel loop is shared out among: more than one, so that each must do its own part.
_TASKS = 3
_DONE = "done"
_KINDS = {"float32": (2, 32), "int8": (0, 8), "uint8": (1, 8), "int32": (0, 32), "int16": (0, 16)}
_TENSOR_POINTER = 7


class EmulatedArm:
    """One kernel, loaded into an emulated machine.

    Args:
        program: What ``kernels.build.compiled`` made for an Arm target.
    """

    def __init__(self, program: tvm.runtime.Executable) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.o")
            program.mod.write_to_file(str(file), "o")
            self._elf = ELFFile(io.BytesIO(file.read_bytes()))
        self._machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self._machine.ctl_set_cpu_model(UC_CPU_ARM64_MAX)
        for start in (_CODE, _STUBS, _STACK, _DATA):
            self._machine.mem_map(start, _SIZE)
        # Vector registers are off until a kernel of an operating system turns them on.
        self._machine.reg_write(UC_ARM64_REG_CPACR_EL1, 3 << 20)
        self._stubs: dict[str, int] = {}
        self._loops: list[list[int]] = []
        self._pages: list[tuple[int, int]] = []
        self._next = _DATA
        self._load()
        self._machine.hook_add(UC_HOOK_CODE, self._called, begin=_STUBS, end=_STUBS + _SIZE)

    def __call__(self, *tensors: Tensor) -> None:
        """Launches the kernel on copies of the tensors' memory, and copies it back."""
        self._next = _DATA
        storages = {own.data_ptr(): own for own in (t.untyped_storage() for t in tensors)}
        places = self._placed(storages)
        views = [self._put(_view(t, places, self._put)) for t in tensors]
        values = b"".join(struct.pack("<iiQ", _TENSOR_POINTER, 0, view) for view in views)
        registers = {
            UC_ARM64_REG_X0: 0,
            UC_ARM64_REG_X1: self._put(values),
            UC_ARM64_REG_X2: len(tensors),
            UC_ARM64_REG_X3: self._put(bytes(16)),
            UC_ARM64_REG_SP: _STACK + _SIZE - 4096,
            UC_ARM64_REG_LR: self._stub(_DONE),
        }
        for register, value in registers.items():
            self._machine.reg_write(register, value)
        self._machine.emu_start(self._symbols["__tvm_ffi_main"], self._stub(_DONE))
        assert self._machine.reg_read(UC_ARM64_REG_X0) & 0xFFFFFFFF == 0, "the kernel failed"
        for key, storage in storages.items():
            if storage.nbytes():
                held = self._machine.mem_read(places[key], storage.nbytes())
                storage.copy_(torch.frombuffer(held, dtype=torch.uint8).untyped_storage())
        while self._pages:
            self._machine.mem_unmap(*self._pages.pop())

    def _placed(self, storages: Mapping[int, torch.UntypedStorage]) -> dict[int, int]:
        """Where each one's content lies now."""
        places, first = {}, _TENSORS
        for key, storage in storages.items():
            size = storage.nbytes()
            room = -(-max(size, 1) // _PAGE) * _PAGE
            self._machine.mem_map(first, room)
            self._pages.append((first, room))
            places[key] = place = first + room - size
            self._machine.mem_write(place, _content(storage))
            first += room + _PAGE
        return places

    def _put(self, content: bytes) -> int:
        place = self._next
        self._machine.mem_write(place, content)
        self._next = -(-(place + len(content) + _ALIGN) // _ALIGN) * _ALIGN
        return place

    def _stub(self, name: str) -> int:
        return self._stubs.setdefault(name, _STUBS + 16 * len(self._stubs))

    def _load(self) -> None:
        """Places the sections, and links them with each other and with the stubs."""
        sections, end = {}, _CODE
        for number, section in enumerate(self._elf.iter_sections()):
            if section["sh_flags"] & SH_FLAGS.SHF_ALLOC and section["sh_size"]:
                sections[number] = place = -(-end // _ALIGN) * _ALIGN
                if section["sh_type"] != "SHT_NOBITS":
                    self._machine.mem_write(place, section.data())
                end = place + section["sh_size"]
        symbols = list(self._elf.get_section_by_name(".symtab").iter_symbols())
        addresses = [
            sections[symbol["st_shndx"]] + symbol["st_value"]
            if symbol["st_shndx"] in sections
            else self._stub(symbol.name)
            for symbol in symbols
        ]
        self._symbols = {symbol.name: place for symbol, place in zip(symbols, addresses)}
        # TVM's runtime is called through pointers of these names.
        for name, where in self._symbols.items():
            if name.startswith("__TVMBackend"):
                self._machine.mem_write(where, _pointer(self._stub(name.removeprefix("__"))))
        slots: dict[int, int] = {}
        for section in self._elf.iter_sections():
            if isinstance(section, RelocationSection) and section["sh_info"] in sections:
                for relocation in section.iter_relocations():
                    where = sections[section["sh_info"]] + relocation["r_offset"]
                    target = addresses[relocation["r_info_sym"]]
                    kind = relocation["r_info_type"]
                    if kind in _OF_SLOTS:
                        slot = slots.setdefault(target, -(-end // _ALIGN) * _ALIGN + 8 * len(slots))
                        self._machine.mem_write(slot, _pointer(target))
                        target, kind = slot, _OF_SLOTS[kind]
                    self._relocate(kind, where, target + relocation["r_addend"])

    def _relocate(self, kind: int, where: int, target: int) -> None:
        """Source: ELF for the Arm 64-bit Architecture, static AArch64 relocations."""
        if kind in _DATA_SIZES:
            size, relative = _DATA_SIZES[kind]
            value = target - where * relative
            content = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._machine.mem_write(where, content)
            return
        (word,) = struct.unpack("<I", self._machine.mem_read(where, 4))
        if kind in (282, 283):  # JUMP26, CALL26
            word |= (target - where >> 2) & 0x3FFFFFF
        elif kind == 275:  # ADR_PREL_PG_HI21
            pages = (target >> 12) - (where >> 12)
            word |= (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5
        elif kind in _LOW_BITS:
            word |= (target & 0xFFF) >> _LOW_BITS[kind] << 10
        else:
            raise AssertionError(f"relocation {kind} is not known to this loader")
        self._machine.mem_write(where, struct.pack("<I", word))

    def _called(self, machine: Uc, address: int, size: int, _: object) -> None:
        name = next((name for name, place in self._stubs.items() if place == address), "nothing")
        if name == _DONE:
            return
        known: dict[str, Callable[[], int | None]] = {
            "TVMBackendParallelLaunch": self._begin_loop,
            "end of a task": self._next_task,
            "TVMBackendAllocWorkspace": self._allocate,
            "TVMBackendFreeWorkspace": lambda: 0,
            "memset": self._fill,
        }
        assert name in known, f"the kernel calls {name}"
        result = known[name]()
        if result is not None:
            machine.reg_write(UC_ARM64_REG_X0, result)
            machine.reg_write(UC_ARM64_REG_PC, machine.reg_read(UC_ARM64_REG_LR))

    def _argument(self, place: int) -> int:
        return int(self._machine.reg_read(UC_ARM64_REG_X0 + place))

    def _begin_loop(self) -> None:
        body, data, back = self._argument(0), self._argument(1), UC_ARM64_REG_LR
        self._loops.append([0, body, data, self._machine.reg_read(back)])
        self._next_task()

    def _next_task(self) -> None:
        """Goes on with the next task of the loop, and behind the last where the loop was begun."""
        task, body, data, back = self._loops[-1]
        if task == _TASKS:
            self._loops.pop()
            changes = {UC_ARM64_REG_X0: 0, UC_ARM64_REG_LR: back, UC_ARM64_REG_PC: back}
        else:
            self._loops[-1][0] += 1
            changes = {
                UC_ARM64_REG_X0: task,
                UC_ARM64_REG_X1: self._put(struct.pack("<Qi", 0, _TASKS)),
                UC_ARM64_REG_X2: data,
                UC_ARM64_REG_LR: self._stub("end of a task"),
                UC_ARM64_REG_PC: body,
            }
        for register, value in changes.items():
            self._machine.reg_write(register, value)

    def _allocate(self) -> int:
        return self._put(bytes(self._argument(2)))

    def _fill(self) -> int:
        place, value, size = (self._argument(i) for i in range(3))
        self._machine.mem_write(place, bytes([value & 255]) * size)
        return place


@contextmanager
def emulation(target: KernelTarget) -> Iterator[None]:
    """Within it the kernels of deployed layers are built for an Arm target, and emulated."""

    def emulated(function: tirx.PrimFunc, target: KernelTarget) -> EmulatedArm:
        return EmulatedArm(compile_program(function, target))

    def build_anew() -> None:
        kernels.layer_kernels.layer_kernel.cache_clear()
        kernels.expert_ops.experts_kernel.cache_clear()

    build_anew()
    with (
        patch.object(kernels.layer_kernels, "runnable", emulated),
        patch.object(kernels.layer_kernels, "cpu_target", lambda: target),
        patch.object(kernels.expert_ops, "cpu_target", lambda: target),
    ):
        yield
    build_anew()


# R_AARCH64_ABS64, ABS32, PREL64, PREL32: bytes, and whether from the place itself.
_DATA_SIZES = {257: (8, 0), 258: (4, 0), 260: (8, 1), 261: (4, 1)}
# ADD_ABS_LO12_NC and LDST8, 16, 32, 64, 128: low bits that the instruction leaves out.
_LOW_BITS = {277: 0, 278: 0, 284: 1, 285: 2, 286: 3, 299: 4}
# ADR_GOT_PAGE and LD64_GOT_LO12_NC: of a slot that holds the address.
_OF_SLOTS = {311: 275, 312: 286}


def _pointer(address: int) -> bytes:
    return struct.pack("<Q", address)


def _content(storage: torch.UntypedStorage) -> bytes:
    return bytes(torch.tensor([], dtype=torch.uint8).set_(storage).numpy())


def _view(tensor: Tensor, places: Mapping[int, int], put: Callable[[bytes], int]) -> bytes:
    """A DLTensor. Source: DLPack, dlpack.h."""
    code, bits = _KINDS[str(tensor.dtype).removeprefix("torch.")]
    sizes: Sequence[Any] = (tensor.shape, tensor.stride())
    shape, strides = (put(struct.pack(f"<{tensor.ndim}q", *own)) for own in sizes)
    first = tensor.storage_offset() * tensor.itemsize
    place = places[tensor.untyped_storage().data_ptr()] + first
    return struct.pack("<QiiiBBHQQQ", place, 1, 0, tensor.ndim, code, bits, 1, shape, strides, 0)
