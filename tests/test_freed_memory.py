"""What a process does with freed memory: kept for the next step, or handed back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HOLD = """
import resource
from pathlib import Path
import torch
from mint.devices import keep_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

keep_freed_memory({keep})
before = resident()
buffers = [torch.ones(1 << 22) for _ in range(4)]  # 64 MiB
del buffers
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc alone takes the setting")
@pytest.mark.parametrize("keep", [False, True])
def test_freed_memory_is_kept_or_handed_back(keep: bool) -> None:
    root = Path(__file__).resolve().parents[1]
    line = [sys.executable, "-c", HOLD.format(keep=keep)]
    held = int(subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert (held > 48 << 20) is keep
    assert (held < 16 << 20) is not keep
