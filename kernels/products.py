"""Matrix products that no gradient flows through, by whatever multiplies fastest on a processor.

torch takes oneDNN for bfloat16 and the BLAS it was built with for float32; on AVX-512 without Intel's name on it oneDNN is
the faster one in float32 too.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def has_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies in this dtype on this processor."""
    bfloat16 = dtype == torch.bfloat16 and _onednn is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return _onednn is not None and (dtype == torch.float32 or bool(bfloat16))


def product(x: Tensor, weight: Tensor, packed: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x weightᵀ: (N, D), (V, D) -> (N, V), by the packed weight if there is one; into `out` where that costs nothing."""
    weight = weight if packed is None else packed
    quick = _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu"
    if not (quick or weight.is_mkldnn):
        return F.linear(x, weight) if out is None else torch.mm(x, weight.T, out=out)
    found: Tensor = _onednn(x, weight, None, "none", [], "")
    return found
