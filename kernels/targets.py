"""Where a kernel will run: a TVM target and what of it the lowerings need to know."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch  # noqa: F401  (first: TVM's CUDA runtime finds libcudart where torch has loaded it)
from tvm.target import Target, codegen

from kernels.cpu_flags import cpu_flags

_AMX_CHIP = "sapphirerapids"
_AMX_FLAGS = {"amx_tile", "amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx512_fp16"}
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18
# Of 32 bits its vector instructions have other names, and half as many registers.
_ARM64 = ("aarch64", "arm64")
CUDA_ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90")


class TargetError(ValueError):
    """A target that this version cannot build for."""


@dataclass(frozen=True)
class KernelTarget:
    """A device to build for.

    Attributes:
        name: ``llvm`` or ``cuda``.
        chip: LLVM's CPU name, ``generic`` for the plain form, or ``sm_XY``.
        vector_registers: Architectural vector registers (CPU), 0 for CUDA.
        vector_bits: Width of one.
        byte_dot_bits: Of the registers of which one instruction sums products of four bytes each
            into int32 (VNNI, SDOT); 0 without.
        byte_bits: Of those whose bytes are multiplied and added in pairs, and looked up in tables
            of 16, by one instruction or a few (SSSE3, AVX2, AVX-512BW, Neon); 0 without.
        neon: True for those of 64-bit Arm.
        amx: True where tiles of 16 rows are multiplied by one instruction (AMX-INT8, AMX-BF16).
        bf16_dot: True where one instruction sums products of bf16 pairs into fp32 (AVX512-BF16).
        triple: LLVM's name of another machine to compile for; None for this one.
    """

    name: str
    chip: str
    vector_registers: int = 0
    vector_bits: int = 0
    byte_dot_bits: int = 0
    byte_bits: int = 0
    neon: bool = False
    triple: str | None = None
    bf16_dot: bool = False
    amx: bool = False

    @property
    def architecture(self) -> int:
        """XY of ``sm_XY``; 0 for a CPU."""
        return int(self.chip.removeprefix("sm_")) if self.name == "cuda" else 0

    @property
    def tvm(self) -> Target:
        """The target in TVM's terms."""
        if self.name == "cuda":
            return Target(
                {
                    "kind": "cuda",
                    "arch": self.chip,
                    "max_threads_per_block": 1024,
                    "max_shared_memory_per_block": 49152,
                    "thread_warp_size": 32,
                },
                host={"kind": "llvm"},
            )
        return _llvm(self.chip, self.triple)


def _llvm(chip: str, triple: str | None) -> Target:
    names = {"mcpu": None if chip == "generic" else chip, "mtriple": triple}
    return Target({"kind": "llvm"} | {key: name for key, name in names.items() if name})


@functools.cache
def host_chip() -> str:
    """LLVM's name of this machine's CPU.

    LLVM goes by the model's number, and a virtual machine may show that of an older one: what has
    AMX is a Sapphire Rapids at least.
    """
    return _AMX_CHIP if cpu_flags() >= _AMX_FLAGS else str(codegen.llvm_get_system_cpu())


@functools.cache
def may_use_amx() -> bool:
    """Asks Linux for AMX's registers, for all threads of this process.

    Source:
        Linux, Documentation/arch/x86/xstate.rst.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)


@functools.cache
def cpu_target(chip: str | None = None, triple: str | None = None) -> KernelTarget:
    """The CPU target for a chip by LLVM's name; without one, for the machine that we run on.

    Instruction sets are LLVM's knowledge of the chip, so that a kernel can be built for another;
    but for AMX, which has to be asked for by the process that uses it, and so is of this machine.
    """
    chip = chip or host_chip()
    probe = _llvm(chip, triple)

    def has(*features: str) -> bool:
        return all(bool(codegen.target_has_features(feature, probe)) for feature in features)

    if has("avx512f"):
        dot, pair = 512 if has("avx512vnni") else 0, 512 if has("avx512bw") else 256
        amx = has("amx-int8", "amx-bf16") and chip == host_chip() and triple is None
        amx = amx and may_use_amx()
        bf16 = has("avx512bf16")
        return KernelTarget("llvm", chip, 32, 512, dot, pair, triple=triple, bf16_dot=bf16, amx=amx)
    if has("avx2"):
        dot = 256 if has("avxvnni") else 0
        return KernelTarget("llvm", chip, 16, 256, dot, 256, triple=triple)
    if has("neon"):
        if (triple or codegen.llvm_get_system_triple()).split("-")[0] not in _ARM64:
            return KernelTarget("llvm", chip, 16, 128, triple=triple)
        dot = 128 if has("dotprod") else 0
        return KernelTarget("llvm", chip, 32, 128, dot, 128, neon=True, triple=triple)
    return KernelTarget("llvm", chip, 16, 128, byte_bits=128 if has("ssse3") else 0, triple=triple)


@functools.cache
def cuda_target(architecture: str) -> KernelTarget:
    """The CUDA target for ``sm_XY``.

    Raises:
        TargetError: If the architecture is none that we compile for.
    """
    if architecture not in CUDA_ARCHITECTURES:
        known = ", ".join(CUDA_ARCHITECTURES)
        raise TargetError(f"{architecture}: no CUDA architecture of ours; known: {known}")
    return KernelTarget("cuda", architecture)
