"""Time to build a report from 5,000 rows, its size, and when a browser can use it.

python tests/prove/report_speed.py
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "reports"))

from browser import chromium
from synthetic_run import measurements, write_run

from reports.build import build

ROWS = 5000


def many_rows() -> list:
    """Rows of distinct shapes, as many as asked for."""
    shapes = [(m, k, n) for m in range(8, 968, 16) for k, n in _widths()]
    return measurements(shapes=shapes)[-ROWS:]


def _widths() -> list[tuple[int, int]]:
    return [(64 * a, 64 * b) for a in range(1, 5) for b in range(1, 4)]


def main() -> None:
    """Prints the figures; exit 1 where a target is missed."""
    with tempfile.TemporaryDirectory() as place:
        folder = write_run(Path(place) / "run", many_rows())
        start = time.monotonic()
        out, _ = build(folder)
        build_s = time.monotonic() - start
        size_mb = out.stat().st_size / 1e6
        print(
            f"{len(many_rows())} rows: built in {build_s:.1f} s (target 10), {size_mb:.2f} MB (3)"
        )
        with chromium(Path(place) / "profile") as tab:
            tab.open(out, 1280)
            ready_s = min(tab.open(out, width) for width in (1280, 390))
        print(f"interactive after {ready_s:.2f} s (target 1)")
    sys.exit(build_s > 10 or size_mb > 3 or ready_s > 1)


if __name__ == "__main__":
    main()
