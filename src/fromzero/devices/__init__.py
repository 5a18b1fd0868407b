"""Devices: facts of the machine, and its memory allocator."""

from fromzero.devices.allocator import give_back_memory, has_glibc, keep_freed_memory
from fromzero.devices.machine import MachineFacts, forget_peak, held_memory, look_at_machine, peak_memory

__all__ = [
    "MachineFacts",
    "forget_peak",
    "give_back_memory",
    "has_glibc",
    "held_memory",
    "keep_freed_memory",
    "look_at_machine",
    "peak_memory",
]
