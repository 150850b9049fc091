"""What a process does with freed memory: kept for the next step, or handed back; and memory in large pages."""

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


LARGE = """
from pathlib import Path
import torch
from mint.devices import ask_for_large_pages

def large():
    return int(Path("/proc/self/smaps_rollup").read_text().split("AnonHugePages:")[1].split()[0]) << 10

torch.ones(1 << 20)
before = large()
if {asked}:
    ask_for_large_pages(64 << 20)
held = [torch.ones(1 << 18) for _ in range(60)]  # 60 MiB, each tensor smaller than a page
print(large() - before)
"""


@pytest.mark.parametrize("asked", [False, True])
def test_memory_that_was_asked_for_in_large_pages_lies_in_them(asked: bool) -> None:
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.is_file() or "[madvise]" not in modes.read_text():
        pytest.skip("needs a Linux that gives large pages to who asks for them")
    root = Path(__file__).resolve().parents[1]
    line = [sys.executable, "-c", LARGE.format(asked=asked)]
    large = int(subprocess.run(line, cwd=root, capture_output=True, text=True, check=True).stdout)
    assert (large > 48 << 20) is asked
    assert (large < 16 << 20) is not asked
