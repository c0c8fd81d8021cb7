"""What of a device the counts of a physical core depend on, and the candidates to choose from."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.features import FormFacts, parallel_units
from profiler.device import DeviceInfo

# Of x86 and Arm cores of today, where a device says nothing.
L2_BYTES = 2**20
LAST_LEVEL_BYTES = 32 * 2**20
# Of our CPU schedules: output channels of a panel, and rows of whole panels of which half panels
# are summed where fewer fit the registers.
PANEL = 32
_FEW_ROWS = 4

# Of x86 server cores 1 to 2 MiB, and some of it is the other thread's.
_L2_LEVELS = (L2_BYTES, 3 * L2_BYTES // 2, 2 * L2_BYTES)
# Output tiles to choose from, (rows, columns): none, our schedules', the rival libraries'.
_TILES = ((1, 1), (16, 32), (32, 32), (64, 64), (128, 64), (128, 128))


@dataclass(frozen=True)
class Machine:
    """What of a device the counts depend on.

    Attributes:
        units: Threads or multiprocessors that share the tiles.
        tile_rows, tile_columns: Output that one of them computes at a time.
        l2_bytes, l3_bytes: Where the second and the last level of the caches end.
    """

    units: int = 1
    tile_rows: int = 1
    tile_columns: int = 1
    l2_bytes: int = L2_BYTES
    l3_bytes: int = LAST_LEVEL_BYTES


def panel_rows(device: DeviceInfo, facts: FormFacts) -> int:
    """Rows of a tile of our linear kernels on a CPU: half of what its vector registers hold.

    All but one where weights are decoded in fp32, once for all rows of a tile; and where there are
    few registers, those that fit with half a panel, but for int8 weights.

    Source: ``kernels.lowerings.panel_gemm.default_tile_rows``.
    """
    flags = device.isa.split()
    registers = 32 if {"avx512f", "asimd"} & set(flags) else 16
    lanes = 16 if "avx512f" in flags else 8 if "avx2" in flags else 4

    def fit(a_row: int) -> int:
        return max(1, (registers - a_row - 2) // a_row)

    largest, of_half_panels = fit(PANEL // lanes), fit(PANEL // lanes // 2)
    if largest < _FEW_ROWS:
        if facts.x_dtype_bytes == 1 and not facts.decodes:
            return largest
        return of_half_panels if facts.x_dtype_bytes == 4 else max(1, of_half_panels * 2 // 3)
    half = max(largest // 2, min(largest, 4))
    return max(half, largest - 1) if facts.decodes and facts.x_dtype_bytes == 4 else half


def machines(core: str, facts: FormFacts, device: DeviceInfo) -> tuple[Machine, ...]:
    """Machines to choose from by cross-validation for a core on a device."""
    units = parallel_units(device)
    last_level = device.last_level_cache_bytes or LAST_LEVEL_BYTES
    if core == "tiles":
        return tuple(
            Machine(shared, *tile, l3_bytes=last_level)
            for tile in _TILES
            for shared in sorted({1, units})
        )
    # A virtual machine shares the last level with others and sees but a part of it.
    seen = {last_level * eighths // 8 for eighths in (2, 4, 5, 6, 8)}
    seen |= {min(last_level, size) for size in (LAST_LEVEL_BYTES, 3 * LAST_LEVEL_BYTES // 2)}
    tile = (panel_rows(device, facts), PANEL) if core == "panels" else (1, 1)
    # Buckets and tables of an attention stay in the second level beside what streams through it.
    beside = (L2_BYTES // 2, 3 * L2_BYTES // 4) if core in ("groups", "chunks") else ()
    return tuple(
        Machine(units, *tile, l2, l3) for l3 in sorted(seen) for l2 in (*beside, *_L2_LEVELS)
    )
