"""What each generation of CPUs has for bytes: products of four a lane, and tables of 16.

On x86 one instruction adds four products from VNNI on. Before, two neighbouring ones are added in
16 bits, which saturate: two of an unsigned byte and of a weight of at most 64 fit (powers of two in
int8 are no larger), two with a weight of 127 do not. For those inputs are signed, the sign goes to
the weight, and what is left is at most 127: one instruction more.

On Arm one instruction adds four products of signed bytes from SDOT on. Before, two neighbours
are added in 16 bits as well, and fit, as no code of ours is -128.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, fill, places
from kernels.packing import DOT_GROUP
from kernels.targets import KernelTarget

# Two products of an unsigned byte and of a weight no larger fit 16 bits.
LARGEST_SMALL_WEIGHT = (2**15 - 1) // (2 * 255)
# LLVM's names, by the bits of a register. AVX-512 has no PSIGNB.
_PMADDUBSW = {
    128: "llvm.x86.ssse3.pmadd.ub.sw.128",
    256: "llvm.x86.avx2.pmadd.ub.sw",
    512: "llvm.x86.avx512.pmaddubs.w.512",
}
_PMADDWD = {
    128: "llvm.x86.sse2.pmadd.wd",
    256: "llvm.x86.avx2.pmadd.wd",
    512: "llvm.x86.avx512.pmaddw.d.512",
}
_PSIGNB = {128: "llvm.x86.ssse3.psign.b.128", 256: "llvm.x86.avx2.psign.b"}
_PSHUFB = {
    128: "llvm.x86.ssse3.pshuf.b.128",
    256: "llvm.x86.avx2.pshuf.b",
    512: "llvm.x86.avx512.pshuf.b.512",
}
# How each reads its inputs, and its name; of 128 bits Arm's.
_DOTS = {
    128: ("int8", "llvm.aarch64.neon.sdot.v4i32.v16i8"),
    256: ("uint8", "llvm.x86.avx512.vpdpbusd.256"),
    512: ("uint8", "llvm.x86.avx512.vpdpbusd.512"),
}
_TBL = "llvm.aarch64.neon.tbl1.v16i8"
_SMULL = "llvm.aarch64.neon.smull.v8i16"
_ADDP = "llvm.aarch64.neon.addp.v8i16"
_SADDLP = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
_CODES = LANES * DOT_GROUP


class ByteDot(NamedTuple):
    """``multiply(sums, x, weights)``: int32x16, int32x16 of four bytes each, and int8x64.

    Attributes:
        inputs: ``int8``, or ``uint8``: type of the bytes of x.
        multiply: Emits it.
    """

    inputs: str
    multiply: Callable[[Any, Any, Any], Any]


def byte_dot(target: KernelTarget, largest_weight: int) -> ByteDot | None:
    """The fastest that a target has for weights no larger; None where it has nothing for it."""
    if bits := target.byte_dot_bits:
        inputs, name = _DOTS[bits]
        return ByteDot(inputs, partial(_by_one, bits, name))
    if target.neon:
        return ByteDot("int8", _by_long_products)
    if not (bits := target.byte_bits):
        return None
    if largest_weight <= LARGEST_SMALL_WEIGHT:
        return ByteDot("uint8", partial(_by_pairs, bits))
    return ByteDot("int8", partial(_by_signed_pairs, min(bits, max(_PSIGNB))))


def byte_table(target: KernelTarget, entries: list[int], index: Any) -> Any:
    """int8x64 of ``entries[index]``, each index in 0..15, where the target looks up bytes."""
    row = tirx.Shuffle([tirx.const(e, "int8") for e in entries], places(16))
    bits = target.byte_bits

    def look_up(part: Any) -> Any:
        table = tirx.Shuffle([row] * (bits // 128), places(bits // 8))
        name = _TBL if target.neon else _PSHUFB[bits]
        return T.call_llvm_pure_intrin(f"int8x{bits // 8}", name, table, part)

    return _whole([look_up(part) for part in _parts(bits, index, _CODES)], bits // 8)


def _by_one(bits: int, name: str, sums: Any, x: Any, weights: Any) -> Any:
    """Source: Intel SDM, VPDPBUSD; Arm Architecture Reference Manual, SDOT."""
    lanes, codes = bits // 32, tirx.reinterpret(f"int8x{_CODES}", x)
    parts = [_parts(bits, sums, LANES), *(_parts(bits, own, _CODES) for own in (codes, weights))]
    done = [T.call_llvm_pure_intrin(f"int32x{lanes}", name, *part) for part in zip(*parts)]
    return _whole(done, lanes)


def _by_pairs(bits: int, sums: Any, x: Any, weights: Any) -> Any:
    """Source: Intel SDM, PMADDUBSW and PMADDWD."""
    codes = _parts(bits, tirx.reinterpret(f"uint8x{_CODES}", x), _CODES)
    fours = [_fours(bits, *part) for part in zip(codes, _parts(bits, weights, _CODES))]
    return sums + _whole(fours, bits // 32)


def _by_signed_pairs(bits: int, sums: Any, x: Any, weights: Any) -> Any:
    """Source: Intel SDM, PABSB and PSIGNB."""
    size, fours = bits // 8, []
    codes = _parts(bits, tirx.reinterpret(f"int8x{_CODES}", x), _CODES)
    for code, weight in zip(codes, _parts(bits, weights, _CODES)):
        turned = T.call_llvm_pure_intrin(f"int8x{size}", _PSIGNB[bits], weight, code)
        overflow = tirx.const(False, "bool")
        magnitude = T.call_llvm_pure_intrin(f"int8x{size}", f"llvm.abs.v{size}i8", code, overflow)
        fours.append(_fours(bits, magnitude, turned))
    return sums + _whole(fours, bits // 32)


def _by_long_products(sums: Any, x: Any, weights: Any) -> Any:
    """Source: Arm Architecture Reference Manual, SMULL, ADDP and SADALP."""
    fours, bits = [], 128
    codes = _parts(bits, tirx.reinterpret(f"int8x{_CODES}", x), _CODES)
    for part in zip(codes, _parts(bits, weights, _CODES)):
        halves = [[tirx.Shuffle([own], places(8, first)) for own in part] for first in (0, 8)]
        products = [T.call_llvm_pure_intrin("int16x8", _SMULL, *half) for half in halves]
        pairs = T.call_llvm_pure_intrin("int16x8", _ADDP, *products)
        fours.append(T.call_llvm_pure_intrin("int32x4", _SADDLP, pairs))
    return sums + _whole(fours, bits // 32)


def _fours(bits: int, x: Any, weights: Any) -> Any:
    """int32 sums of four products each, of a register."""
    ones = fill(tirx.const(1, "int16"), bits // 16)
    pairs = T.call_llvm_pure_intrin(f"int16x{bits // 16}", _PMADDUBSW[bits], x, weights)
    return T.call_llvm_pure_intrin(f"int32x{bits // 32}", _PMADDWD[bits], pairs, ones)


def _parts(bits: int, vector: Any, lanes: int) -> list[Any]:
    """A vector cut into registers."""
    count = 512 // bits
    if count == 1:
        return [vector]
    each = lanes // count
    return [tirx.Shuffle([vector], places(each, part * each)) for part in range(count)]


def _whole(parts: list[Any], lanes: int) -> Any:
    """The registers of so many lanes each as one vector again."""
    return parts[0] if len(parts) == 1 else tirx.Shuffle(parts, places(lanes * len(parts)))
