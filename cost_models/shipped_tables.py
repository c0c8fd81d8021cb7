"""Latency tables that ship with the package: measured by us, found by name or by device.

To ship another one: ``python -m cost_models.table ship TABLE``, and name it here.
"""

from __future__ import annotations

import re
from pathlib import Path

from profiler.device import DeviceInfo

FOLDER = Path(__file__).parent / "shipped"

# Name of a table -> fingerprint of the device that it was measured on.
SHIPPED: dict[str, str] = {
    "amd-zen4-avx512-2c-1t": "87923691d0273616",
    "intel-xeon-amx-2c-1t": "1e467a9986197d6d",
    "amd-zen3-avx2-2c-1t": "05e0e6f9d609d42c",
}

# Family and model of x86 processors -> vendor and microarchitecture, first and last model.
_MICROARCHITECTURES: dict[str, tuple[tuple[int, int, str], ...]] = {
    "23": ((0x00, 0x2F, "amd-zen"), (0x30, 0xFF, "amd-zen2")),
    "25": (
        (0x00, 0x0F, "amd-zen3"),
        (0x10, 0x1F, "amd-zen4"),
        (0x20, 0x5F, "amd-zen3"),
        (0x60, 0xAF, "amd-zen4"),
    ),
    "26": ((0x00, 0xFF, "amd-zen5"),),
    "6": (
        (0x55, 0x55, "intel-skylake"),
        (0x6A, 0x6C, "intel-icelake"),
        (0x8F, 0x8F, "intel-sapphire-rapids"),
        (0xAD, 0xAE, "intel-granite-rapids"),
        (0xCF, 0xCF, "intel-emerald-rapids"),
    ),
}

# What names of processors say beside what they are.
_TRADE = re.compile(r"\((?:R|TM)\)|\b(?:Processor|CPU)\b")


def shipped_tables() -> tuple[str, ...]:
    """Names of the tables that ship."""
    return tuple(SHIPPED)


def shipped_path(name: str) -> Path | None:
    """File of the table of that name; None if none ships."""
    return FOLDER / f"{name}.json.gz" if name in SHIPPED else None


def shipped_for(device: DeviceInfo) -> str | None:
    """Name of the table that was measured on such a device, in these settings; None without one."""
    found = (name for name, fingerprint in SHIPPED.items() if fingerprint == device.fingerprint)
    return next(found, None)


def table_name(device: DeviceInfo) -> str:
    """What a device's table is called: ``amd-zen4-avx512-2c-1t``, ``h200``.

    A CPU goes by its microarchitecture, or its name where a virtual machine hides that, its widest
    vectors or tiles, cores and threads used; a GPU by its name.
    """
    if device.kind == "cuda":
        return _slug(device.name.removeprefix("NVIDIA "))
    match = re.search(r"(\d+)/(\d+)", device.isa)
    family, model = match.groups() if match else ("", "-1")
    found = (
        name
        for first, last, name in _MICROARCHITECTURES.get(family, ())
        if first <= int(model) <= last
    )
    widest = (name for name in ("amx", "avx512", "avx2", "asimd") if name in device.isa)
    parts = (next(found, _slug(_TRADE.sub("", device.name))), next(widest, "scalar"))
    return "-".join((*parts, f"{device.cores}c", f"{device.threads}t"))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
