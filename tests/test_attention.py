"""Attention in blocks against one dense masked softmax, in value and gradients, on plain rows and random forests."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mint.kernels import blocks, tree_attention, tree_layout


def ends_of(parents: list[int]) -> Tensor:
    """end of each token from its parent (-1: a root), tokens in depth-first order; by walking up from every token."""
    end = list(range(1, len(parents) + 1))
    for token in range(len(parents)):
        at = token
        while at >= 0:
            end[at] = max(end[at], token + 1)
            at = parents[at]
    return torch.tensor(end, dtype=torch.int64)


def random_forest(count: int, seed: int, straight: float) -> Tensor:
    """A random depth-first forest: mostly straight runs, or branches from a random ancestor, or a new root."""
    drawn = torch.Generator().manual_seed(seed)
    line: list[int] = []  # the path to the last token
    parents: list[int] = []
    for token in range(count):
        if line and float(torch.rand((), generator=drawn)) > straight:
            del line[int(torch.randint(0, len(line) + 1, (), generator=drawn)) :]
        parents.append(line[-1] if line else -1)
        line.append(token)
    return ends_of(parents)


def dense(q: Tensor, k: Tensor, v: Tensor, end: Tensor) -> Tensor:
    """The definition: every query against every key under the mask j <= i < end[j], heads repeated."""
    at = torch.arange(len(end))
    mask = (at <= at[:, None]) & (at[:, None] < end)
    repeat = q.shape[1] // k.shape[1]
    heads_first = (x.transpose(0, 1) for x in (q, k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(0, 1)


def drawn_qkv(count: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(count)
    sizes = (heads, kv_heads, kv_heads)
    return [(2 * torch.randn(count, h, width, generator=drawn, dtype=torch.float64)).to(dtype) for h in sizes]


def with_gradients(attend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weights).sum(), inputs)


def agree(end: Tensor, heads: int, kv_heads: int, width: int, layout: Any = None) -> None:
    """Value and gradients; in blocks unless another layout is given."""
    q, k, v = drawn_qkv(len(end), heads, kv_heads, width)
    layout = blocks.tree_blocks(end) if layout is None else layout
    ours = with_gradients(lambda *x: tree_attention(*x, layout), q, k, v)
    theirs = with_gradients(lambda *x: dense(*x, end), q, k, v)
    for name, one, other in zip(("out", "d_q", "d_k", "d_v"), ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 128, 200])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2), (6, 1)])
def test_a_plain_row_is_causal_attention(count: int, heads: int, kv_heads: int) -> None:
    agree(torch.full((count,), count), heads, kv_heads, 8)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("straight", [0.5, 0.95, 0.99])
def test_a_random_forest_is_dense_masked_attention(seed: int, straight: float) -> None:
    agree(random_forest(150 + 37 * seed, seed, straight), 4, 2, 16)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 150), seed=st.integers(0, 1000), straight=st.floats(0, 1), heads=st.sampled_from([1, 3]))
@example(count=140, seed=0, straight=0.0, heads=1)
def test_any_forest_is_dense_masked_attention(count: int, seed: int, straight: float, heads: int) -> None:
    agree(random_forest(count, seed, straight), heads, 1, 4)


@pytest.mark.parametrize("lengths", [[130], [70, 1, 64]])
def test_plain_rows_are_causal_attention_by_torch_and_in_blocks(lengths: list[int]) -> None:
    stops = itertools.accumulate(lengths)
    end = torch.cat([torch.full((n,), stop) for n, stop in zip(lengths, stops, strict=True)])
    layout = tree_layout(end)
    assert isinstance(layout, blocks.Rows)
    assert layout.suit_torch(torch.float64)
    agree(end, 4, 2, 16, layout)
    agree(end, 4, 2, 16)


@pytest.mark.parametrize("shorter", [63, 1])
def test_torch_takes_float32_and_long_rows_and_no_trees(shorter: int) -> None:
    plain = tree_layout(torch.full((blocks.LONG,), blocks.LONG))
    assert plain.suit_torch(torch.bfloat16)
    short = tree_layout(torch.full((shorter,), shorter))
    assert short.suit_torch(torch.float32)
    assert not short.suit_torch(torch.bfloat16)
    branched = torch.cat([torch.full((100,), 140), torch.full((20,), 120), torch.full((20,), 140)])
    assert not isinstance(tree_layout(branched), blocks.Rows)


@pytest.mark.parametrize("width", [80, 123])
def test_head_widths_that_are_no_power_of_two(width: int) -> None:
    agree(random_forest(130, 1, 0.97), 2, 2, width)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(0, 180), seed=st.integers(0, 1000), straight=st.floats(0.5, 1))
def test_the_blocks_cover_every_query_once_and_only_keys_that_are_seen(count: int, seed: int, straight: float) -> None:
    end = random_forest(count, seed, straight)
    layout = blocks.tree_blocks(end)
    assert [block.first for block in layout] == [0, *(block.stop for block in layout)][:-1] if count else not layout
    assert (layout[-1].stop if layout else 0) == count
    for block in layout:
        assert 0 < block.stop - block.first <= blocks.QUERIES
        keys = [token for run in block.runs for token in range(run.start, run.stop)]
        needed = {j for i in range(block.first, block.stop) for j in range(i + 1) if i < int(end[j])}
        assert sorted(keys) == keys
        assert set(keys) == needed


def test_a_long_branch_never_meets_its_siblings_or_neighbours() -> None:
    """A prompt of 200 and four answers of 100, twice: every key that is read is one that some query of the block sees."""
    one = ends_of([*range(-1, 199), *(x for a in range(4) for x in (199, *range(200 + 100 * a, 299 + 100 * a)))])
    end = torch.cat([one, one + 600])
    read = sum((b.stop - b.first) * sum(r.stop - r.start for r in b.runs) for b in tree_layout(end))
    at = torch.arange(1200)
    seen = int(((at <= at[:, None]) & (at[:, None] < end)).sum())
    assert read < 1.35 * seen
    agree(end, 2, 1, 8)


@pytest.mark.parametrize("straight", [0.97, 1.0])
def test_bfloat16_stays_within_the_error_of_plain_attention(straight: float) -> None:
    """Against float64 truth, no worse than torch's own attention, in value and every gradient."""
    end = random_forest(260, 3, straight)
    exact = drawn_qkv(260, 4, 2, 64, torch.bfloat16)
    layout = tree_layout(end)
    truth = with_gradients(lambda *x: dense(*x, end), *(x.double() for x in exact))
    plain = with_gradients(lambda *x: dense(*x, end), *exact)
    ours = with_gradients(lambda *x: tree_attention(*x, layout), *exact)
    for name, mine, theirs, right in zip(("out", "d_q", "d_k", "d_v"), ours, plain, truth, strict=True):
        error, budget = ((x.double() - right).norm() / right.norm() for x in (mine, theirs))
        assert error <= 1.1 * budget, f"{name}: {error:.2e} against {budget:.2e}"


def test_scores_that_would_overflow_an_exponential_stay_finite() -> None:
    q, k, v = (x * 40 for x in drawn_qkv(100, 2, 1, 16, torch.float32))
    end = random_forest(100, 5, 0.9)
    for one in with_gradients(lambda *x: tree_attention(*x, tree_layout(end)), q, k, v):
        assert torch.isfinite(one).all()


def test_a_wrong_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is able to fail: a mask that is off by one at the diagonal, or at the end of a branch."""
    real = blocks._mask

    def shifted(end: Tensor, runs: tuple[slice, ...], first: int, stop: int) -> Tensor:
        return real(end + 1, runs, first, stop)

    def strict(end: Tensor, runs: tuple[slice, ...], first: int, stop: int) -> Tensor:
        mask = real(end, runs, first, stop)
        return mask.masked_fill(torch.arange(mask.shape[1]) == mask.shape[1] - 1, 0)

    for wrong in (shifted, strict):
        monkeypatch.setattr(blocks, "_mask", wrong)
        with pytest.raises(AssertionError):
            agree(random_forest(150, 2, 0.9), 2, 1, 8)


@pytest.mark.parametrize("queries", [3, 48, blocks.ON_GPU])
def test_branches_through_torchs_own_attention_see_what_the_blocks_see(queries: int) -> None:
    """As a GPU does it: tokens of two tries after a run of five, and of seven."""
    end = random_forest(60, 3, 0.7)
    own, (q, k, v) = blocks.tree_blocks(end, queries), drawn_qkv(132, 6, 2, 8)
    layout = (*blocks.moved(own, (slice(0, 5),), 12, 0), *blocks.moved(own, (slice(5, 12),), 72, 60))
    wanted = blocks.tree_attention(q[:120], k, v, layout)
    torch.testing.assert_close(blocks.branch_attention(q[:120], k, v, layout), wanted)
    seen = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[:, :3] = True
    layout = blocks.masked(seen)
    wanted = blocks.tree_attention(q[:4], k[:9], v[:9], layout)
    torch.testing.assert_close(blocks.branch_attention(q[:4], k[:9], v[:9], layout), wanted)
