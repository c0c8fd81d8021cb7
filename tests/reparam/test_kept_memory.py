import subprocess
import sys
from pathlib import Path

import pytest

from reparam.kept_memory import keep_freed_memory

COUNTS_PAGE_FAULTS = """
import resource, sys, torch
from reparam.kept_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

for warm_up in range(10):
    torch.ones(16 << 20)
before = faults()
for again in range(5):
    torch.ones(16 << 20)
print(faults() - before)
"""


def page_faults(which):
    command = [sys.executable, "-c", COUNTS_PAGE_FAULTS, which]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_what_is_freed_is_not_faulted_in_again():
    if not keep_freed_memory():
        pytest.skip("this C library gives memory back as it likes")
    assert page_faults("kept") < 0.1 * page_faults("as it is")


FILLS_MEMORY = r"""
import re, torch
from pathlib import Path
from reparam.kept_memory import keep_freed_memory

keep_freed_memory()
filled = torch.ones(16 << 20)
print(re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[1])
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_what_is_allocated_lies_in_huge_pages():
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("this system has no huge pages to give")
    if not keep_freed_memory():
        pytest.skip("this C library has no heap that grows at one end")
    command = [sys.executable, "-c", FILLS_MEMORY]
    held_kb = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(held_kb) > (48 << 10)
