"""Sections on where the figures come from: machine, commands, versions, method."""

from __future__ import annotations

from profiler.device import DeviceInfo
from reports.formats import Cell, bytes_text, missing
from reports.html import Section, Table
from reports.run_folder import ADVISE, FINETUNE, FIT, SWEEP, RunFolder

_DEVICE_FIELDS = (
    "kind",
    "name",
    "uuid",
    "isa",
    "threads",
    "cores",
    "memory_bytes",
    "last_level_cache_bytes",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "power_limit_w",
    "ecc",
    "mig",
    "driver",
    "cuda",
    "governor",
    "os",
)


def _devices(run: RunFolder) -> dict[str, DeviceInfo]:
    """Every device of the run by its fingerprint, the verdict's first."""
    devices = [run.device] if run.device else []
    devices += [row.device for row in run.rows or ()]
    devices += [part.device for part in (run.table, run.fit, *run.beside) if part and part.device]
    return {device.fingerprint: device for device in reversed(devices)} if devices else {}


def _field(device: DeviceInfo, name: str) -> str | Cell:
    value = getattr(device, name)
    if value is None or value == "":
        return missing("not readable or not applicable")
    return bytes_text(value) if name.endswith("_bytes") else str(value)


def _lowerings(run: RunFolder) -> list[Table]:
    if run.table is None:
        return []
    rows = tuple((form, ", ".join(run.table.lowerings(form))) for form in run.table.forms)
    caption = f"Latency table: {len(run.table.entries)} measured entries, forms and lowerings"
    return [Table(caption, ("form", "lowerings"), rows)]


def machine(run: RunFolder) -> Section:
    """Who was measured, by which commands, with which versions."""
    found = _devices(run)
    first = run.device.fingerprint if run.device else ""
    devices = sorted(found.values(), key=lambda device: device.fingerprint != first)
    names = tuple(device.label for device in devices)
    table = Table(
        "Machine fingerprint",
        ("field", *names),
        (
            ("fingerprint", *(device.fingerprint for device in devices)),
            *((name, *(_field(device, name) for device in devices)) for name in _DEVICE_FIELDS),
        ),
        is_open=True,
    )
    packages = sorted({package for device in devices for package in device.software})
    versions = Table(
        "Software versions",
        ("package", *names),
        tuple(
            (package, *(device.software.get(package, "not recorded") for device in devices))
            for package in packages
        ),
    )
    files: list[tuple[str | Cell, ...]] = []
    if run.rows is not None:
        stamps = [row.created_at for row in run.rows]
        span = f"{min(stamps)} to {max(stamps)}" if stamps else "empty"
        runs = ", ".join(sorted({row.run for row in run.rows if row.run})) or "unnamed"
        files.append(("measurements.sqlite", SWEEP, span, f"{len(stamps)} rows, sweeps: {runs}"))
    if run.table:
        files.append(
            ("latency_table.json", FIT, run.table.created_at, f"SHA-256 {run.table.sha256}")
        )
    if run.fit:
        files.append(
            ("fit.json", FIT, run.fit.created_at, f"from {run.fit.store}, seed {run.fit.seed}")
        )
    if run.results:
        note = f"recipe {run.results.recipe}, seed {run.results.seed}, router's table SHA-256 "
        files.append(
            (
                "results.json",
                run.results.command or FINETUNE,
                run.results.created_at,
                note + run.results.latency_table_sha256,
            )
        )
    for name, part in (
        ("ablation.json", run.ablation),
        ("versus_torch.json", run.versus_torch),
        ("scaling.json", run.scaling),
    ):
        if part:
            files.append((name, part.command, part.created_at, ""))
    if run.advice:
        told = f"{run.advice.model}, table SHA-256 {run.advice.table_sha256 or 'none'}"
        files.append(("advice.json", ADVISE, missing("not noted"), told))
    made = Table(
        "Files and the commands that made them",
        ("file", "command", "when", "what"),
        tuple(files),
        is_open=True,
    )
    return Section(
        "machine",
        "Machine, commands, versions",
        tuple(_warnings(run)),
        (),
        (table, made, *_lowerings(run), versions),
        tuple(dict.fromkeys(str(row[1]) for row in files)),
    )


def _warnings(run: RunFolder) -> list[str]:
    found = []
    if run.results and run.rows is not None:
        # reparam.finetune writes rows of whole models, of its own device, into the same store.
        measured = {row.device.fingerprint for row in run.rows if row.kind == "primitive"}
        if measured and run.results.device.fingerprint not in measured:
            found.append(
                "Take care: results.json is from another device than measurements.sqlite; the "
                "verdict on the model and the figures of the kernels do not belong together."
            )
    if run.results and run.table and run.results.latency_table_sha256 != run.table.sha256:
        found.append(
            "Take care: the router was trained with another latency table than the one in this "
            "folder (their SHA-256 differ)."
        )
    return found


def method(run: RunFolder) -> Section:
    """How everything was measured, in one paragraph."""
    return Section(
        "method",
        "Method",
        (
            "Our kernels and the baselines are timed by the same clock, interleaved in one run, "
            "into preallocated outputs, from the same input type to the same output type, each "
            "with its weights packed beforehand; everything is built and checked against a "
            "float64 oracle on fresh random inputs before the first timing. A latency is the "
            "median of the clean samples with its 95 % interval; samples contaminated by other "
            "processes, clock drops or stolen time are dropped and counted, and where too few "
            "are left there is no figure but a reason. Hot and cold caches are different figures. "
            "A claim of speed is a ratio with its interval: of the rounds that both were in, or, "
            "where the sweep noted none, the low end of one latency over the high end of the "
            "other. It counts only if the whole interval is on one side of 1× and the difference "
            "exceeds the noise floor, and nothing is called fastest where a baseline failed. Shift "
            "is also set against our own mult in 8 and 7 bits with the same schedule, for that "
            "ratio says what the shift itself brings. Accuracy has Wilson's 95 % interval, "
            "differences a paired one on the same images. Energy is counted over long windows of "
            "repeated launches; what was modelled says modelled, what was measured says measured, "
            "and a missing figure is a dash with its reason.",
        ),
    )
