"""What this machine offers: the device and dtype that `auto` stands for, threads, and memory at its peak and left."""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn

from . import parallel
from .errors import ConfigError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "float16": torch.float16}


def pick_device(device: str | torch.device) -> torch.device:
    """The device by name; `auto` is the first GPU where there is one."""
    unknown = f"--device {device}: no such device; wanted auto, cpu or cuda"
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if str(device) == "auto" else device)
    except RuntimeError:
        raise ConfigError(unknown) from None
    if found.type not in ("cpu", "cuda", "meta"):
        raise ConfigError(unknown)
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: this machine has no CUDA device that torch can use; give cpu or auto")
    if found.type == "cuda" and parallel.size() > 1:
        parallel.check_gpus()
    return found


def pick_dtype(dtype: str | torch.dtype, device: torch.device, stored: torch.dtype = torch.float32) -> torch.dtype:
    """The dtype by name. `auto` is that of the checkpoint, but bfloat16 only where products in it are not slower."""
    name = str(dtype).removeprefix("torch.")
    if name != "auto":
        if name not in DTYPES:
            raise ConfigError(f"--dtype {name}: wanted auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if stored not in (torch.bfloat16, torch.float16):
        return torch.float32
    return torch.bfloat16 if device.type in ("cuda", "meta") or fast_bfloat16() else torch.float32


@cache
def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones: tried once, in some milliseconds.

    Where several processes work together the first one decides for all.
    """

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(512, 512, dtype=dtype)
        return min(_timed(lambda: x @ x) for _ in range(4))

    return bool(parallel.from_first(seconds(torch.bfloat16) < seconds(torch.float32)))


def _timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread meanwhile.

    With a small network every product ends in one thread waiting for the other. On a quiet machine the second still saves
    a fifth of the time; where another process holds its core, a step takes ten to sixty times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_for(network: nn.Module) -> AbstractContextManager[None]:
    """One thread for a small network, for others as many as torch takes."""
    return one_thread() if sum(part.numel() for part in network.parameters()) < _SMALL else nullcontext()


_SMALL = 2_000_000
"""Parameters from which on two threads halve the time."""


def keep_freed_memory(keep: bool) -> None:
    """Let a process on Linux keep the memory it frees for its next step, or hand back buffers of 8 MiB and more at once.

    A training step asks for the same large buffers again and again; each page that comes back from the kernel is cleared
    first, which costs a tenth of a step. But large buffers that are kept leave gaps, which count when activations are
    computed again to save memory. Other systems are left as they are.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):  # glibc
            library.mallopt(_MMAP_THRESHOLD, 1 << 30 if keep else 1 << 23)
            library.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1 if keep else 1 << 23)


def ask_for_large_pages(size: int) -> None:
    """Let the next `size` bytes of this process lie in pages of 2 MB, where Linux has them and the C library takes them from
    its heap. What is read whole again and again is read a tenth faster so: fewer pages have to be found. The process keeps
    that memory for the next time."""
    if sys.platform != "linux" or not hasattr(library := ctypes.CDLL(None), "mallopt"):
        return
    keep_freed_memory(True)
    sizes = [min(_BLOCK, size - at) for at in range(0, size, _BLOCK)]
    blocks = [torch.empty(one, dtype=torch.uint8) for one in sizes]  # untouched, and free again at the end
    for block in blocks:
        first = -(-block.data_ptr() // _LARGE_PAGE) * _LARGE_PAGE
        length = (block.data_ptr() + len(block)) // _LARGE_PAGE * _LARGE_PAGE - first
        if length > 0:
            library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)


_BLOCK, _LARGE_PAGE = 1 << 28, 1 << 21
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of malloc.h


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: on the GPU, or resident on the processor."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on this device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: assume what a small machine has
        return 8 << 30
