"""The command ``shiftadd``: every command of the suite under one name.

It knows the others by name only and imports one when it is called, so that no package comes to
depend on another by it.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

_BAD_INPUT = 2

# What each is called, the module that does it, and what it is for.
COMMANDS: dict[str, tuple[str, str]] = {
    "sweep": ("profiler.sweep", "measure kernels and baselines on this machine"),
    "tune": ("profiler.tune", "search the kernels' schedules for this machine"),
    "compare": ("profiler.compare", "two sweeps: what became faster or slower"),
    "export": ("profiler.export", "measurements as Parquet or CSV"),
    "energy": ("profiler.energy_recorder", "record and examine this machine's energy meter"),
    "fit": ("cost_models.fit", "measurements -> latency models -> latency table"),
    "suggest": ("cost_models.suggest", "what to measure next, where the models are least sure"),
    "validate": ("cost_models.validate", "how well the latency models predict"),
    "table": ("cost_models.table", "latency tables: differences, CSV"),
    "advise": ("cost_models.advise", "what to convert in a timm model, without training"),
    "finetune": ("reparam.finetune", "convert, fine-tune in two stages, deploy, compare"),
    "ablate": ("reparam.ablate", "what each step of the conversion brings and costs"),
    "evaluate": ("reparam.evaluate", "deployed models: latency, growth, against torch"),
    "report": ("reports.build", "one page: does it pay here, where, by how much, how sure"),
}


def available() -> dict[str, tuple[str, str]]:
    """The commands whose module is installed."""
    return {name: found for name, found in COMMANDS.items() if find_spec(found[0])}


def usage() -> str:
    """What ``shiftadd --help`` prints."""
    found = available()
    width = max(map(len, found))
    lines = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in found.items()]
    return "\n".join(
        (
            "Does replacing multiplications by shifts and adds pay on this device?",
            "",
            "Usage: shiftadd COMMAND [OPTIONS]; shiftadd COMMAND --help explains one.",
            "",
            *lines,
            "",
            "In order: sweep, fit, finetune, report; each is python -m MODULE as well.",
        )
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command as ``python -m`` would, with the arguments after its name."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    name, *rest = given or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    found = available()
    if name not in found:
        print(f"error: {name}: no such command; known: {', '.join(found)}", file=sys.stderr)
        raise SystemExit(_BAD_INPUT)
    sys.argv = [f"shiftadd {name}", *rest]
    runpy.run_module(found[name][0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
