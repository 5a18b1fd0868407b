"""Freed memory stays: a block of a training step's size comes from the heap, which is kept, not from the system."""

import subprocess
import sys

import pytest

from fromzero.devices import has_glibc

CODE = """
import ctypes, sys
from fromzero.devices import keep_freed_memory

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory()
before = libc.mallinfo2().hblkhd
blocks = [libc.malloc(25_000_000) for _ in range(4)]
mapped = libc.mallinfo2().hblkhd - before
heap = libc.mallinfo2().arena
for block in blocks:
    libc.free(block)
print(mapped, heap - libc.mallinfo2().arena)
"""


@pytest.mark.skipif(not has_glibc(), reason="this system's allocator is not glibc's")
def test_large_blocks_come_from_a_heap_that_is_kept_only_where_it_was_asked_for() -> None:
    found = {}
    for mode in ("keep", "plain"):
        done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        found[mode] = tuple(map(int, done.stdout.split()))
    assert found["keep"] == (0, 0), "bytes taken from the system, bytes of the heap given back"
    assert found["plain"][0] >= 100_000_000
