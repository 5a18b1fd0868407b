"""The peak of a process is its own."""

import subprocess
import sys


def test_the_peak_of_what_started_a_process_is_no_part_of_its_own() -> None:
    """Linux carries the parent's peak over an exec into what getrusage says."""
    own = "from fromzero.devices import peak_memory; print(peak_memory())"
    fat = f"import subprocess, sys; held = bytearray(900_000_000); subprocess.run([sys.executable, '-c', {own!r}], check=True)"
    alone, below = (int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) for code in (own, fat))
    assert 50_000_000 < alone < 600_000_000
    assert abs(below - alone) < 100_000_000
