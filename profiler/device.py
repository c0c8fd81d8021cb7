"""DeviceInfo: who was measured. Its fingerprint keys every row."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ConfigDict

from kernels.cpu_flags import cpu_flags

# What makes two machines differ as devices. Clocks and versions are recorded beside, not keyed:
# they may change between two sweeps on the same card.
_IDENTITY = (
    "kind",
    "name",
    "uuid",
    "isa",
    "threads",
    "cores",
    "power_limit_w",
    "mig",
)


class DeviceError(ValueError):
    """A device that was asked for and is not there."""


class DeviceInfo(BaseModel):
    """A measured device.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        name: Marketing name of the processor or GPU.
        uuid: GPU UUID; None for a CPU.
        isa: Vector extensions that matter for the kernels (CPU) or the architecture (``sm_90``).
        threads: CPU threads used; 0 for a GPU.
        cores: Physical cores visible (CPU) or streaming multiprocessors (GPU).
        memory_bytes: Main or device memory.
        last_level_cache_bytes: None where unreadable.
        sm_clock_mhz, memory_clock_mhz, power_limit_w, ecc, mig, driver, cuda: GPU only.
        governor: CPU frequency governor where readable.
        os: Kernel and architecture.
        software: Versions of what produced the figures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cpu", "cuda"]
    name: str
    uuid: str | None = None
    isa: str = ""
    threads: int = 0
    cores: int = 0
    memory_bytes: int = 0
    last_level_cache_bytes: int | None = None
    sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    power_limit_w: float | None = None
    ecc: bool | None = None
    mig: bool | None = None
    driver: str | None = None
    cuda: str | None = None
    governor: str | None = None
    os: str = ""
    software: dict[str, str] = {}

    @property
    def fingerprint(self) -> str:
        """16 hex digits, equal for equal hardware in equal settings."""
        identity = "|".join(f"{name}={getattr(self, name)}" for name in _IDENTITY)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    @property
    def label(self) -> str:
        """Short text for people."""
        threads = (
            f", {self.threads} thread{'s' * (self.threads != 1)}" if self.kind == "cpu" else ""
        )
        return f"{self.name} ({self.isa}{threads})"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match.group(1) if match else platform.processor() or platform.machine()


def _cpu_family() -> str:
    info = _read("/proc/cpuinfo") or ""
    parts = [
        re.search(rf"^{key}\s*:\s*(\S+)$", info, re.MULTILINE) for key in ("cpu family", "model")
    ]
    return "/".join(part.group(1) for part in parts if part)


def _isa() -> str:
    flags = cpu_flags()
    names = (
        "avx512_vnni",
        "avx512_bf16",
        "avx_vnni",
        "avx512f",
        "amx_int8",
        "avx2",
        "asimd",
        "asimddp",
    )
    found = " ".join(name for name in names if name in flags)
    return f"{platform.machine()} {_cpu_family()} {found}".strip()


def _last_level_cache_bytes() -> int | None:
    sizes = [_read(f"/sys/devices/system/cpu/cpu0/cache/index{index}/size") for index in (4, 3, 2)]
    for size in sizes:
        match = re.fullmatch(r"(\d+)([KM])", size or "")
        if match:
            return int(match.group(1)) * {"K": 2**10, "M": 2**20}[match.group(2)]
    return None


def software_versions() -> dict[str, str]:
    """Versions of the packages that shape a figure."""
    found = {"python": platform.python_version()}
    for package in ("torch", "apache-tvm", "apache-tvm-ffi", "timm", "numpy", "shiftadd-suite"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_info(threads: int, isa: str | None = None) -> DeviceInfo:
    """The CPU that this process runs on, used with ``threads`` threads.

    Args:
        threads: How many.
        isa: The vector extension that kernels are built for where that is not all it has.

    Raises:
        DeviceError: If ``threads`` is not between 1 and the number of usable CPUs, or the CPU has
            no such extension.
    """
    if isa is not None and isa not in cpu_flags():
        raise DeviceError(f"--isa {isa}: this CPU does not have it")
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if not 1 <= threads <= usable:
        raise DeviceError(f"--threads: {threads} is not between 1 and the {usable} usable CPUs")
    return DeviceInfo(
        kind="cpu",
        name=_cpu_name(),
        isa=_isa() if isa is None else f"{platform.machine()} {_cpu_family()} {isa}",
        threads=threads,
        cores=psutil.cpu_count(logical=False) or usable,
        memory_bytes=psutil.virtual_memory().total,
        last_level_cache_bytes=_last_level_cache_bytes(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        software=software_versions(),
    )
