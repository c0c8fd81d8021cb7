"""What a launch spends its time on, counted: the part of a latency model that is not learned.

A core is a list of terms, each a count that costs some fixed time a piece: row tiles, bytes from a
level of the caches, launches. Times are fitted and never negative, so that a prediction cannot fall
where every count rises. All is plain arithmetic on numbers or arrays (``features.Sizes``).
"""

from __future__ import annotations

from collections.abc import Callable

from cost_models.features import FormFacts, Numbers, Sizes, traffic_bytes, weight_bytes
from cost_models.machine import PANEL, Machine
from profiler.device import DeviceInfo

L1_BYTES = 32 * 2**10

# Of our CPU schedules: lanes of a vector.
_LANES = 16
# Above this many bytes of weights a panel is kept hot and the rows are streamed past it; as many
# bytes of rows are prepared at a time.
_STREAM_BYTES = 512 * 2**10
# Of the add kernels: tokens from which on a group has six bits instead of four, bits of a word of
# a code, tokens of a chunk.
_LONG_TOKENS = 512
_WORD_BITS = 32
_CHUNK_TOKENS = 1024
_MOST_CHUNKS = 16
# Two lines of a cache: that many bytes of a token come from memory before they are asked for.
_AHEAD_BYTES = 128
# Of AMX: rows of a tile and of a block whose sums the registers hold, bytes of k that one product
# consumes, blocks and panels of a task, and weights that few rows are multiplied with at a time.
_AMX_ROWS, _AMX_BLOCK = 16, 32
_AMX_BYTES = 64
_AMX_BLOCKS, _AMX_PANELS = 4, 8
_AMX_RESIDENT_BYTES = 1280 * 2**10
_PAGE_BYTES = 4096
_FIRST_LEVEL = 48 * 2**10


Terms = dict[str, Numbers]


def _ceil(value: Numbers, step: int) -> Numbers:
    return -(-value // step)


def _least(value: Numbers, other: Numbers) -> Numbers:
    """The smaller of two, for numbers and arrays alike."""
    return (value + other - abs(value - other)) / 2


def _most(value: Numbers, other: Numbers) -> Numbers:
    return (value + other + abs(value - other)) / 2


def _within_one(share: Numbers) -> Numbers:
    """A share, 0 below nothing and 1 above all: in few steps, a lookup takes ten of them."""
    share = share * (share > 0)
    return share + (share > 1) * (1 - share)


def _beyond(held: Numbers, level: float) -> Numbers:
    """Share of accesses to ``held`` bytes that miss a cache of ``level`` bytes, 0 to 1.

    Nothing misses below half of the level: a cost must not be fitted on traces of a share.
    """
    return _within_one((held / level - 0.5) / 1.5)


def _beyond_in_turns(held: Numbers, level: float) -> Numbers:
    """The same of bytes that each launch touches once, in turns: sooner all of them miss.

    What is least recently used is replaced first, and is just what is needed next.
    """
    return _within_one((held / level - 0.75) / 0.75)


def _beyond_first(held: Numbers) -> Numbers:
    """The same of rows at random in a first level of 32 to 48 KiB: sooner and all at once."""
    return _within_one((held / _FIRST_LEVEL - 0.6) / 0.8)


def _busiest(tasks: Numbers, units: int) -> Numbers:
    """Share of all work that the unit with the most tasks does, others waiting for it."""
    return _ceil(tasks, units) / tasks


def _panels(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Our linears: tiles of rows × one panel of 32 channels, accumulated over the whole of k.

    Source: ``kernels.lowerings.panel_gemm``.
    """
    _, m, k, n = sizes
    rows, units = machine.tile_rows, machine.units
    panels = _ceil(n, PANEL)
    # Of the last panel only the vectors that any channel is in.
    vectors = _ceil(n, _LANES) / 2
    depth = _ceil(k, round(4 / facts.x_dtype_bytes))
    steps = vectors * depth
    tiles = _ceil(m, rows)
    share = _busiest(tiles * panels, units)
    full, rest = m // rows, m % rows
    terms: Terms = {"launch": 1.0 + 0 * m, "row_steps": full * rows * steps * share}
    cuts = full
    block = 1 << ((rows - 1).bit_length() - 1) if rows > 1 else 0
    while block:
        present = (rest // block) % 2
        terms[f"steps_of_{block}"] = present * steps * share
        cuts = cuts + present
        block //= 2
    weights = weight_bytes(sizes, facts)
    panel = weights / panels
    outer = (weights > _STREAM_BYTES) * 1.0
    prepared = m * k * facts.x_dtype_bytes
    held = _least(prepared, _STREAM_BYTES) if facts.prepares else prepared
    blocks = prepared / held
    # Kept hot or streamed past: a panel by the tiles of its rows, all weights by each row tile.
    again = tiles * weights * share
    reused = outer * panel + (1 - outer) * weights
    streamed_rows = outer * prepared * panels * share
    terms |= {
        "tiles": cuts * panels * share,
        "row_panels": m * vectors * share,
        "half_steps": m * depth / 2 * share * (_ceil(n, _LANES) % 2),
        "weights_l2": again * _beyond(reused, L1_BYTES),
        "weights_l3": (outer * blocks + (1 - outer)) * weights * _beyond(weights, machine.l2_bytes),
        "weights_memory": blocks * weights * _beyond(weights, machine.l3_bytes),
        "rows_l2": streamed_rows * _beyond(held, L1_BYTES),
        "rows_l3": streamed_rows * _beyond(held, machine.l2_bytes),
        "rows_memory": streamed_rows * _beyond(held, machine.l3_bytes),
    }
    if facts.prepares:
        prepared_rows = m * _busiest(m, units)
        terms |= {"prepared": prepared_rows * k, "prepared_rows": prepared_rows}
    return terms | _streamed(sizes, facts, machine)


def _amx(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Our linears by AMX: tasks of rows × a group of panels, in blocks of tiles of 16 rows.

    Source: ``kernels.lowerings.amx``, ``kernels.lowerings.panel_gemm.amx_default_schedule``.
    """
    _, m, k, n = sizes
    units = machine.units
    panels, weights = _ceil(n, PANEL), weight_bytes(sizes, facts)
    task_rows, groups = amx_tasks(n, weights, facts)
    row_tasks = _ceil(m, task_rows)
    vectors = panels * (1 - 0.5 * (n <= _LANES))
    share = _busiest(row_tasks * groups, units)
    prepared = m * k * facts.x_dtype_bytes
    held = (weights / panels) + _least(prepared, k * facts.x_dtype_bytes * _AMX_BLOCK)
    # What passes through the caches until a task needs the same weights again: all of them, its
    # rows and its results.
    rows = _least(m, task_rows)
    passed = weights + rows * (k * (facts.x_bytes + facts.x_dtype_bytes) + n * facts.out_bytes)
    blocks = _ceil(m, _AMX_BLOCK) * panels * share
    steps = _ceil(k, round(_AMX_BYTES / facts.x_dtype_bytes))
    # Rows of a group's results lie a whole row of the output apart: on pages of their own.
    pages = m * groups * _least(n * facts.out_bytes / _PAGE_BYTES, 1.0)
    products = _ceil(m, _AMX_ROWS) * vectors * steps * share
    terms: Terms = {
        "launch": 1.0 + 0 * m,
        "products": products,
        "blocks": blocks,
        "tasks": row_tasks * groups * share,
        "row_panels": m * vectors * share,
        "half_products": products * (n <= _LANES),
        "blocks_l2": blocks * held * _beyond(held, L1_BYTES),
        "block_weights": _ceil(m, _AMX_BLOCK) * weights * share * _beyond(held, L1_BYTES),
        "pages": pages * share * _beyond(m * n * facts.out_bytes, machine.l2_bytes),
        "weights_l2": row_tasks * weights * share * _beyond(weights, L1_BYTES),
        "weights_l3": row_tasks * weights * share * _beyond(passed, machine.l2_bytes),
        "weights_memory": row_tasks * weights * _beyond(weights, machine.l3_bytes),
        "prepared": m * k * _busiest(m, units),
        "prepared_rows": m * _busiest(m, units),
    }
    if facts.w_bytes < facts.x_dtype_bytes:
        terms["decoded"] = row_tasks * vectors * k * share
    return terms | _streamed(sizes, facts, machine)


def amx_tasks(n: Numbers, weights: Numbers, facts: FormFacts) -> tuple[Numbers, Numbers]:
    """Rows of a task by AMX, and how many groups of panels there are.

    Args:
        n: Outputs.
        weights: Bytes of them.
        facts: Of the form.
    """
    panels = _ceil(n, PANEL)
    few = _most(_least(_AMX_PANELS // panels, _AMX_BLOCKS), 1)
    many = (weights > _AMX_RESIDENT_BYTES) | (facts.w_bytes < 1)
    blocks = few + (_AMX_BLOCKS - few) * many
    groups = 2 * _ceil(panels, 2 * _AMX_PANELS)
    return _AMX_BLOCK * blocks, _ceil(panels, _ceil(panels, groups))


def _streamed(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Operands and result, each touched once: from where all of them together fit."""
    b, m, k, n = sizes
    total = traffic_bytes(sizes, facts)
    x, out = b * m * k * facts.x_bytes, b * m * n * facts.out_bytes
    # Rows that begin within a cache line: their vectors lie in two.
    split = (n % _LANES != 0) * out
    l3 = _beyond_in_turns(total, machine.l2_bytes)
    memory = _beyond_in_turns(total, machine.l3_bytes)
    return {
        "split": split,
        "split_to_l3": split * l3,
        "x_from_l3": x * l3,
        "x_from_memory": x * memory,
        "out_to_l3": out * l3,
        "out_to_memory": out * memory,
    }


def _groups(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Our add kernels, a task a head: additions of rows by groups of code bits.

    Source: ``kernels.lowerings.add``.
    """
    # Buckets and tables of the two products lie beside each other.
    return _grouped(sizes, facts, machine, 1.0, 1.0 if facts.kind in ("kv", "qkv") else 2.0)


def _chunks(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Our add kernels with each sequence cut into chunks, each with buckets and tables its own."""
    tokens = sizes.k if facts.kind == "kv" else sizes.m
    wanted = _ceil(tokens, _CHUNK_TOKENS)
    even = wanted + wanted % 2
    return _grouped(sizes, facts, machine, _least(even, _MOST_CHUNKS), 1.0)


def _grouped(
    sizes: Sizes, facts: FormFacts, machine: Machine, chunks: Numbers, products: float
) -> Terms:
    b, m, k, n = sizes
    tokens, bits = (k, m) if facts.kind == "kv" else (m, k)
    largest = 4 + 2 * (tokens >= _LONG_TOKENS)
    # No group straddles two words of a code.
    groups = bits // _WORD_BITS * _ceil(_WORD_BITS, largest) + _ceil(bits % _WORD_BITS, largest)
    rows = groups * 2.0 ** (bits / groups)
    # Some CPUs take half of a vector in half of the time.
    vectors, lanes = _ceil(n, _LANES), n / _LANES
    share = _busiest(b * chunks, machine.units)
    held = rows * n * 4
    additions = b * tokens * groups * vectors * share
    buckets = b * chunks * rows * vectors * share
    return {
        "launch": 1.0 + 0 * b,
        "heads": b * chunks * share,
        "tokens": b * tokens * share,
        "codes": b * tokens * _ceil(bits, _LANES) * share,
        "row_bytes": b * tokens * groups * n * 4 * share,
        "additions": additions,
        "additions_lanes": b * tokens * groups * lanes * share,
        "additions_l2": additions * _beyond_first(held),
        "buckets": buckets,
        "buckets_lanes": b * chunks * rows * lanes * share,
        "buckets_l2": buckets * _beyond_first(products * held),
        "chunk_sums": b * (chunks - 1) * bits * vectors,
    } | _attention_streamed(sizes, facts, machine)


def _attention_streamed(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Queries, keys, values and result, each touched once.

    A core asks for the rows of the next tokens while it adds: some bytes of each cost no waiting.
    """
    total = traffic_bytes(sizes, facts)
    tokens = sizes.b * (sizes.k if facts.kind == "kv" else sizes.m)
    l3 = _beyond_in_turns(total, machine.l2_bytes)
    memory = _beyond_in_turns(total, machine.l3_bytes)
    return {
        "streamed_l3": total * l3,
        "streamed_memory": total * memory,
        "waited_memory": _most(total - tokens * _AHEAD_BYTES, 0.0) * memory,
    }


def _tiles(sizes: Sizes, facts: FormFacts, machine: Machine) -> Terms:
    """Any other kernel: tiles of the output, the last ones overhanging, in waves over the units.

    Source: NVIDIA, Matrix Multiplication Background User's Guide, tile and wave quantisation.
    """
    b, m, k, n = sizes
    rows, columns = _ceil(m, machine.tile_rows), _ceil(n, machine.tile_columns)
    waves = _ceil(b * rows * columns, machine.units)
    area = machine.tile_rows * machine.tile_columns * facts.products
    total = traffic_bytes(sizes, facts)
    return {
        "launch": 1.0 + 0 * m,
        "macs": waves * area * k,
        "waves": waves,
        "outputs": b * m * n,
        "bytes": total,
        "bytes_l3": total * _beyond(total, machine.l2_bytes),
        "bytes_memory": total * _beyond(total, machine.l3_bytes),
    }


CORES: dict[str, Callable[[Sizes, FormFacts, Machine], Terms]] = {
    "panels": _panels,
    "amx": _amx,
    "groups": _groups,
    "chunks": _chunks,
    "tiles": _tiles,
}


def cores_for(
    lowering: str, facts: FormFacts, is_baseline: bool, device: DeviceInfo
) -> tuple[str, ...]:
    """Cores that may describe a kernel: our own schedules', and the one that fits any."""
    if is_baseline or device.kind != "cpu":
        return ("tiles",)
    if facts.kind != "linear":
        return ("groups", "chunks", "tiles")
    return ("amx" if ".amx_" in lowering else "panels", "tiles")
