import subprocess
import sys
from pathlib import Path

import pytest

from reparam.kept_memory import keep_freed_memory

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FILLS_MEMORY = r"""
import re, sys, torch
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from huge_pages import small_pages
from reparam.kept_memory import keep_freed_memory

def huge_mib():
    held_kb = re.search(r"AnonHugePages: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1]
    return int(held_kb) >> 10

keep_freed_memory()
with small_pages():
    before, small = huge_mib(), torch.ones(16 << 20)
    print(huge_mib() - before)
before, huge = huge_mib(), torch.ones(16 << 20)
print(huge_mib() - before)
"""


def test_one_model_lies_in_small_pages_and_the_other_in_huge_ones():
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("this system has no huge pages to give")
    if not keep_freed_memory():
        pytest.skip("this C library has no heap that grows at one end")
    command = [sys.executable, "-c", FILLS_MEMORY, str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    small, huge = map(int, done.stdout.split())
    assert small < 8 and huge > 48
