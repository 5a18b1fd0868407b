"""Devices: facts of the machine."""

from fromzero.devices.machine import MachineFacts, look_at_machine, peak_memory

__all__ = ["MachineFacts", "look_at_machine", "peak_memory"]
