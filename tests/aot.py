"""Compiles every Triton kernel for a GPU that need not be there, and prints registers, spills and shared memory.

`python tests/aot.py [80 90] [--json] [--only NAME]`. The public functions run on tensors without storage ("meta"); a
launch is not made but compiled for the compute capability asked for, with the very arguments and specialisations of
the launch. Exit code 1 if any kernel spills.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mint.kernels import attention, between, fused, logprob, odds, reference, step

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


def source(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """What a launch with these arguments would compile: None and 1 are constants, multiples of 16 are known as such, but
    where a kernel asks for no such specialisation."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attrs = {}, {}, {}
    for at, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        whole = isinstance(value, int)
        known = whole and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (known and value == 1):
            signature[parameter.name], constants[(at,)] = "constexpr", value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[parameter.name] = "*" + TYPES[value.dtype] if tensor else "i32" if whole else "fp32"
        if tensor or (known and value % 16 == 0):
            attrs[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attrs)


def assembled(ptx: str, capability: int) -> dict[str, int]:
    """Registers and spilled bytes of a kernel, by the assembler's own account."""
    program = get_ptxas(capability).path
    name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [program, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    stored, loaded = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    return {"registers": int(re.search(r"(\d+) registers", log)[1]), "spills": int(stored) + int(loaded)}


class Compiler:
    """Stands in for the launcher: compiles each different launch once."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.seen: dict[str, dict[str, Any]] = {}

    def __call__(self, kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        launch = {key: value for key, value in kwargs.items() if key not in ("grid", "warmup")}
        options = {key: launch.pop(key) for key in OPTIONS if key in launch}
        made = source(kernel, args, launch)
        key = f"{made.hash()} {options}"
        if key in self.seen:
            return
        compiled = triton.compile(made, target=GPUTarget("cuda", self.capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        types = sorted({kind[1:] for kind in made.signature.values() if kind in ("*bf16", "*fp16", "*fp32")})
        self.seen[key] = {
            "capability": self.capability, "kernel": kernel.__name__.strip("_"), "types": types[0] if types else "",
            "blocks": " ".join(f"{name}={value}" for name, value in launch.items() if type(value) is int),
            "warps": options.get("num_warps", 4), "stages": options.get("num_stages", 3),
            **assembled(ptx, self.capability), "shared": compiled.metadata.shared,
            "matrix": "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else "",
        }  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def walks() -> None:
    """token_logprob at the widths of Llama 3.2 and 3.1, at few rows, where a tile is the whole vocabulary, and where the last
    tile has an odd number of columns."""
    half, single = torch.bfloat16, torch.float32
    sizes = ((8192, 4096, 128256, 16, half), (2048, 3072, 128256, 256, half), (128, 2048, 128256, 16, half),
             (8192, 2048, 32003, 16, half), (1024, 2048, 32003, 16, single), (3, 7, 1, 1, single))  # fmt: skip
    for n, width, vocabulary, r, dtype in sizes:
        hidden, low = meta(n, width, dtype=dtype), meta(n, r, dtype=dtype)
        head = reference.Head(meta(vocabulary, width, dtype=dtype), None, meta(vocabulary, r, dtype=dtype))
        labels, grad = meta(n, dtype=torch.int64), meta(n, dtype=torch.float32)
        over, again = (
            reference.Walk.over.__func__,
            reference.Walk.again.__func__,
        )  # not the operators: those never launch
        over(logprob.KernelWalk, hidden, None, head._replace(up=None), labels, None, True)
        over(logprob.KernelWalk, hidden, low, head, labels, None, True)
        walked = over(logprob.KernelWalk, hidden, low, head, labels, None, False)
        again(logprob.KernelWalk, hidden, low, head, labels, walked, grad, None, [True, False, True])
        logprob._scaled._init_fn(meta(n, width, dtype=torch.float32), grad, dtype)


def ratios() -> None:
    single = torch.float32
    odds.LogOddsRatio.apply(meta(64, dtype=single), meta(64, dtype=single))
    odds.Terms.apply(meta(9000, dtype=single), meta(9000, dtype=torch.int64), meta(129, dtype=torch.int64))


def attentions() -> None:
    """Head widths and groups of Llama 3.2 (64: 32/8, 128: 24/8), and 80, which is padded to 128."""
    for d, heads, groups in ((64, 32, 8), (80, 16, 16), (128, 24, 8)):
        for dtype in (torch.bfloat16, torch.float32)[: 1 if d == 80 else 2]:  # in float32, 80 compiles as 128 does
            tokens, layout = 32000, attention.tree_layout(torch.full((1000,), 1000))
            layout = attention.Layout(*(attention.Visits(*(x.to("meta") for x in part)) if isinstance(part, tuple)
                                        else part.to("meta") for part in layout))  # fmt: skip
            q, k, v = (meta(tokens, n, d, dtype=dtype).requires_grad_() for n in (heads, groups, groups))
            attention.tree_attention(q, k, v, layout).sum().backward()


def betweens() -> None:
    """Norms of Llama 3.2's widths, of a head alone and of Llama 3.1 70B and 405B; rotation of its heads; SwiGLU."""
    for dtype in (torch.bfloat16, torch.float32):
        for n, width in ((8192, 3072), (8192, 128), (1024, 8192), (1024, 16384)):
            x, weight = meta(n, width, dtype=dtype).requires_grad_(), meta(width, dtype=dtype)
            between.rms_norm(x, weight, 1e-5, fused).sum().backward()
            sum(part.sum() for part in between.add_rms_norm(x, x, weight, 1e-5, fused)).backward()
        for n, heads, d in ((8192, 24, 128), (8192, 16, 80)):
            x, angles = meta(n, heads, d, dtype=dtype).requires_grad_(), meta(n, 1, d // 2, dtype=dtype)
            between.rotate(x, angles, angles, fused).sum().backward()
        gates, up = (meta(8192, 8192, dtype=dtype).requires_grad_() for _ in range(2))
        between.swiglu(gates, up, fused).sum().backward()
        fused.gate(*meta(4, 2 * 8192, dtype=dtype).split(8192, dim=1))


def steps() -> None:
    """A step of Llama 3.2 3B and 1B, and one whose heads are no power of two."""
    for d, heads, groups in ((128, 24, 8), (64, 32, 8), (80, 16, 16)):
        for dtype in (torch.bfloat16, torch.float32):
            cache, angles = meta(4, groups, 560, d, dtype=dtype), meta(4, 1, d // 2, dtype=dtype)
            places = meta(4, dtype=torch.int64), meta(1, dtype=torch.int64)
            together = meta(4, (heads + 2 * groups) * d, dtype=dtype).unflatten(1, (-1, d))
            qkv = together.split([heads, groups, groups], dim=1)
            step.step_attention(*qkv, angles, angles, cache, cache, *places)


CASES: tuple[Callable[[], None], ...] = (walks, ratios, attentions, betweens, steps)


def compile_all(capability: int) -> list[dict[str, Any]]:
    compiler = Compiler(capability)
    JITFunction.run = lambda kernel, *args, **kwargs: compiler(kernel, *args, **kwargs)  # noqa: PLW0108 (binds)
    attention.capability = lambda device: divmod(capability, 10)  # noqa: ARG005
    for case in CASES:
        if "--only" not in sys.argv or case.__name__ in sys.argv:
            case()
    return list(compiler.seen.values())


def main() -> int:
    capabilities = [int(word) for word in sys.argv[1:] if word.isdigit()] or [80, 90]
    rows = [row for capability in capabilities for row in compile_all(capability)]
    if "--json" in sys.argv:
        print(*(json.dumps(row) for row in rows), sep="\n")
    else:
        print(*("| " + " | ".join(map(str, row)) + " |" for row in (rows[0], *(r.values() for r in rows))), sep="\n")
    return int(any(row["spills"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
