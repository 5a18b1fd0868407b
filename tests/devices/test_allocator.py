"""Freed memory stays: the same large block, taken again and again, costs no new pages."""

import subprocess
import sys

import pytest

from fromzero.devices import has_glibc

CODE = """
import resource, sys, torch
from fromzero.devices import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def once():
    blocks = [torch.ones(5_000_000) for _ in range(6)]
for _ in range(5): once()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): once()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not has_glibc(), reason="this system's allocator is not glibc's")
def test_blocks_taken_again_cost_page_faults_only_where_memory_is_not_kept() -> None:
    faults = {}
    for mode in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(done.stdout)
    assert faults["keep"] < 200 < faults["plain"]
