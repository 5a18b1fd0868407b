"""The machine: nothing in, facts out: device, threads, memory, versions."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fromzero.devices.allocator import has_glibc
from fromzero.errors import PlanRefused


@dataclass(frozen=True)
class MachineFacts:
    """memory_bytes: what can be used now, cgroup and ulimit included.  host_bytes: the same of the host, beside a GPU

    disk_bytes: what may be kept in the cache, for whoever asks
    """

    device: str
    device_name: str
    threads: int
    memory_bytes: int
    bf16: bool
    keeps_memory: bool  # its allocator can be told to keep what was freed
    python: str
    torch: str
    system: str
    host_bytes: int = 0
    disk_bytes: int = 0


def look_at_machine(asked: str = "auto") -> MachineFacts:
    """asked: auto | cpu | cuda | mps.  raises: PlanRefused where the device asked for is not here"""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = ("cuda" if there["cuda"] else "cpu") if asked == "auto" else asked
    if not there[device]:
        raise PlanRefused(f"this machine has no {device} device", mend="limits.device: auto takes what there is", key="limits.device")
    return MachineFacts(
        device=device,
        device_name=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        threads=usable_cores(),
        memory_bytes=torch.cuda.mem_get_info()[0] if device == "cuda" else free_memory(),
        keeps_memory=device == "cpu" and has_glibc(),
        bf16=device == "cuda" and torch.cuda.is_bf16_supported(),
        python=platform.python_version(),
        torch=torch.__version__,
        system=f"{platform.system()} {platform.machine()}",
        host_bytes=free_memory(),
    )


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that this process may still take: the least of free memory, cgroup limit and ulimit."""
    candidates = [_from_meminfo(), _from_cgroup()]
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            candidates.append(max(soft - _mapped(kind == resource.RLIMIT_DATA), 0))
    known = [c for c in candidates if c is not None]
    return min(known) if known else 4 * 2**30


def _from_meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _mapped(data: bool) -> int:
    """Bytes of this process that ulimit -v counts, or -d"""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return 0
    return int(pages[5 if data else 0]) * resource.getpagesize()


def _from_cgroup() -> int | None:
    """Of version 2 of the interface, or of version 1"""
    for folder, limit, used in (("", "memory.max", "memory.current"), ("memory/", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            most = Path(f"/sys/fs/cgroup/{folder}{limit}").read_text().strip()
            now = Path(f"/sys/fs/cgroup/{folder}{used}").read_text().strip()
        except OSError:
            continue
        return None if most == "max" else max(int(most) - int(now), 0)
    return None


def held_memory() -> int:
    """Bytes this process holds now (on cuda: its tensors there); 0 where the system does not say."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def forget_peak() -> None:
    """Let `peak_memory` count from now on, where the system can (Linux, cuda); elsewhere it goes on as before."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak resident set size


def peak_memory() -> int:
    """Most bytes this process has held since the start or `forget_peak` (on cuda: that its tensors have held there)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError, StopIteration):  # getrusage also counts what held the process that started this one, up to its exec
        status = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
