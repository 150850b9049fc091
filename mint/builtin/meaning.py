"""What words tell of classes: counts of both together, as vectors that a tiny network can begin with.

log p(word, class) / p(word) p(class), less its mean over words and over classes, is a table of rank at most the number of
classes. Its singular vectors are the words' and the classes' own: their product is the association.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def associations(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """counts (W, C), none 0 -> words (W, R), strengths (R,), classes (C, R): words @ diag(strengths) @ classes.T."""
    shares = (counts / counts.sum(1, keepdim=True)).log()
    centred = shares - shares.mean(1, keepdim=True)
    words, strengths, classes = torch.linalg.svd(centred - centred.mean(0), full_matrices=False)
    return words, strengths, classes.T
