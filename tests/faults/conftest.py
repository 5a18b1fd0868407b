"""A fork of the tests' process that strace strikes: killed at a call, or told that a call failed."""

import os
import random
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def struck(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Run work in a fork of this process, from its first call on under strace with some options.

    returns: its exit code (-9 after SIGKILL, else the number of the OSError that ended it, else 0), and what strace wrote
    """
    if shutil.which("strace") is None:
        pytest.skip("NOT CHECKED: there is no strace to strike with")

    def strike(work: Callable[[], object], *options: str) -> tuple[int, str]:
        (wait, go), drawn = os.pipe(), random.getstate()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none of them
            child = os.fork()
        if child == 0:
            code = 121
            try:
                random.setstate(drawn)  # Python seeds a fork anew
                os.read(wait, 1)
                work()
                code = 0
            except OSError as error:
                code = error.errno or 122
            finally:
                os._exit(code)
        log = tmp_path / "strace.log"
        tracer = subprocess.Popen(["strace", "-qq", "-y", "-o", str(log), "-p", str(child), *options], stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 20
        while "TracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text() and tracer.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        held = tracer.poll() is None
        os.write(go, b"x")
        _, status = os.waitpid(child, 0)
        _, said = tracer.communicate(timeout=20)
        os.close(wait)
        os.close(go)
        if not held:
            pytest.skip(f"NOT CHECKED: strace may not hold another process here ({said.strip()})")
        return os.waitstatus_to_exitcode(status), log.read_text()

    return strike
