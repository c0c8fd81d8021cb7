"""How much faster is a deployed model in huge pages? Beside itself in small ones, in turns.

python tests/prove/huge_pages.py --model deit_tiny_patch16_224 --batch 8

Both are plans of the same weights in one process and take the same random images; while the first
was made, the process had no huge pages. The system may gather small pages into huge ones meanwhile,
which makes the ratio smaller, never larger. Prints medians of rounds with their 95 % interval. Exit
code 1 if huge pages are surely slower.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import torch
import typer

from kernels.torch_ops import set_threads
from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.ratios import paired_ratio
from profiler.samples import PRESETS
from profiler.timing import measure_interleaved
from reparam.convert import ConversionError
from reparam.evaluate import example_of, prepared
from reparam.kept_memory import keep_freed_memory
from reparam.plan import Plan

_PR_SET_THP_DISABLE = 41

app = typer.Typer(add_completion=False)


@contextmanager
def small_pages() -> Iterator[None]:
    """What is touched first in here lies in small pages. Source: prctl(2), malloc_trim(3)."""
    glibc = ctypes.CDLL("libc.so.6")
    # Freed memory is given back, and comes again as pages of the other size.
    glibc.malloc_trim(0)
    if glibc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0):
        raise BadInput("this system does not let a process do without huge pages")
    try:
        yield
    finally:
        glibc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)
        # Gives back the rest of the heap too, so that it has to be grown again.
        glibc.malloc_trim(0)
        keep_freed_memory.cache_clear()
        keep_freed_memory()


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="Any timm model.")] = "deit_tiny_patch16_224",
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Reads top to bottom as the story of the comparison."""
    if not keep_freed_memory():
        raise BadInput("this C library has no heap that huge pages can be asked for")
    set_threads(threads)
    with small_pages():
        original, deployed_at = prepared(model)
        example, deployed = example_of(original, batch), deployed_at(0.5)
        small = Plan(deployed, example)
    huge = Plan(copy.deepcopy(deployed), example)
    launches = {"small": partial(small, example), "huge": partial(huge, example)}
    with torch.no_grad():
        # Not to the last bit: PyTorch's kernels sum in another order where arrays begin elsewhere.
        torch.testing.assert_close(huge(example), small(example), rtol=0, atol=1e-3)
        timings = measure_interleaved(launches, PRESETS["precise"])
    ratio = paired_ratio(timings["small"], timings["huge"])
    if ratio is None:
        reasons = [timing.reason for timing in timings.values() if timing.reason]
        print(f"{model}, batch {batch}: {reasons[0] if reasons else 'too few rounds'}")
        return
    print(
        f"{model}, batch {batch}: {ratio.value:.3f} times as fast in huge pages"
        f" ({ratio.low:.3f} to {ratio.high:.3f})"
    )
    if ratio.high < 1:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app, (ConversionError,))
