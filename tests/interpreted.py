"""The Triton kernels in Triton's interpreter, against float64 truth; test_kernels_triton.py runs it in its own process.

The interpreter has no bfloat16 arithmetic to trust, so values are checked in float64, float32 and float16; in the
kernels every bfloat16 value is cast to float32 before it is touched.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from truth_of_kernels import (
    arguments,
    errors,
    forest,
    obvious_logprob,
    pair,
    true_attention,
    true_logprob,
    with_gradients,
    worst,
)

from mint import kernels
from mint.kernels import attention, exact, logprob, odds, reference, step

LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 3e-2}


def ours(tile=None):
    return lambda a: kernels.token_logprob(**a, tile=tile)


def test_the_door_opens_to_the_kernels():
    assert kernels._backend(torch.zeros(1), "logprob") is logprob
    assert logprob.WALK is logprob.KernelWalk


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(
    ("n", "d", "v", "tile"), [(3, 7, 11, 4), (47, 33, 252, 100), (6, 70, 507, None), (2, 4, 1, None), (3, 252, 47, 46)]
)
def test_log_p_and_every_gradient_equal_the_truth_at_odd_sizes(n, d, v, tile, dtype):
    a, weights = arguments(n, d, v, r=3, bias=True, dtype=dtype), torch.linspace(-1, 1, n, dtype=torch.float64)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    assert worst(with_gradients(ours(tile), a, weights), truth) < LIMITS[dtype]


@pytest.mark.parametrize("largest", [16, 64])
def test_a_tile_wider_than_a_program_is_crossed_in_steps(monkeypatch, largest):
    monkeypatch.setattr(logprob, "LARGEST", largest)
    monkeypatch.setattr(logprob.block, "__defaults__", (largest,))
    a, weights = arguments(5, 9, 252, dtype=torch.float64), torch.rand(5)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    assert worst(with_gradients(ours(100), a, weights), truth) < 1e-12
    with torch.no_grad():
        torch.testing.assert_close(ours(100)(a), truth["logp"])


def test_more_rows_than_walk_together_give_the_same(monkeypatch):
    monkeypatch.setattr(logprob.KernelWalk, "rows", 4)
    a, weights = arguments(11, 8, 60, r=2, dtype=torch.float64), torch.rand(11)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    assert worst(with_gradients(ours(32), a, weights), truth) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_is_no_larger_than_that_of_the_obvious_code_at_the_same_precision(dtype):
    found, budget = [], []
    for seed in range(3):
        a = arguments(16, 48, 252, r=4, bias=True, dtype=dtype, seed=seed)
        weights = torch.rand(16, generator=torch.Generator().manual_seed(seed))
        truth = with_gradients(true_logprob, a, weights, torch.float64)
        found.append(errors(with_gradients(ours(100), a, weights), truth))
        budget.append(errors(with_gradients(obvious_logprob, a, weights), truth))
    for name in found[0]:
        mean, limit = (sum(one[name][0] for one in several) for several in (found, budget))
        assert mean <= 1.5 * limit, (name, mean, limit)  # a head in float32 has 1.2 to 1.4: two more roundings


@pytest.mark.parametrize("rising", [True, False])
def test_levels_that_rise_from_tile_to_tile_scale_the_sums(rising):
    """Logits climb by 20 a tile, far beyond SLACK, or fall: the first tile alone counts."""
    a = arguments(4, 3, 50, r=2, dtype=torch.float64)
    steps = torch.arange(50, dtype=torch.float64) // 10 * 20
    a["bias"] = steps if rising else -steps
    truth = with_gradients(true_logprob, a, torch.ones(4), torch.float64)
    assert worst(with_gradients(ours(10), a, torch.ones(4)), truth) < 1e-12


@pytest.mark.parametrize("tile", [None, 2, 5])
def test_a_tile_of_strongly_negative_or_forbidden_logits_gives_no_nan(tile):
    a = arguments(6, 4, 15, bias=True)
    a["bias"][:5], a["bias"][5:8] = -1e30, float("-inf")
    a["labels"] = torch.tensor([8, 9, 10, 11, 12, 14])
    found = with_gradients(ours(tile), a, torch.ones(6))
    kept = {"hidden": a["hidden"], "head": a["head"][8:], "bias": a["bias"][8:], "labels": a["labels"] - 8}
    truth = with_gradients(true_logprob, kept, torch.ones(6), torch.float64)
    found = {name: value[8:] if name in ("head", "bias") else value for name, value in found.items()}
    assert worst(found, truth) < 1e-5


@pytest.mark.parametrize("margin", [14, 16, 40, 80])
def test_log_p_and_its_gradient_keep_their_digits_near_one(margin):
    logits = torch.tensor([[30.0, 30.0 + margin, 30.0]], requires_grad=True)
    logp = kernels.token_logprob(logits, torch.eye(3), torch.tensor([1]), tile=1)
    logp.backward()
    left = 2 * torch.tensor(-float(margin), dtype=torch.float64).exp().item()
    assert logp.item() == pytest.approx(-left, rel=1e-5)
    assert logits.grad[0].tolist() == pytest.approx([-left / 2, left, -left / 2], rel=1e-5)


@pytest.mark.parametrize("label", [0, 3, 4, 7, 8, 9])
def test_a_label_at_the_border_of_a_tile_counts_once(label):
    a = arguments(1, 6, 10, dtype=torch.float64) | {"labels": torch.tensor([label])}
    truth = with_gradients(true_logprob, a, torch.ones(1), torch.float64)
    assert worst(with_gradients(ours(4), a, torch.ones(1)), truth) < 1e-12


def test_a_label_outside_the_vocabulary_gives_nan_in_its_row_alone(monkeypatch):
    monkeypatch.setattr(logprob, "check", lambda *_: None)  # on a device the labels cannot be looked at
    a = arguments(4, 6, 10) | {"labels": torch.tensor([-100, 3, 10, 0])}
    assert kernels.token_logprob(**a).isnan().tolist() == [True, False, True, False]


def test_torch_compile_takes_forward_and_backward_without_a_break(monkeypatch):
    monkeypatch.setattr(logprob, "check", lambda *_: None)  # it looks at labels that lie in main memory
    a, weights = arguments(5, 8, 30, r=2, bias=True), torch.rand(5)
    compiled = torch.compile(lambda a: logprob.token_logprob(**a, tile=8), backend="aot_eager", fullgraph=True)
    found, plain = (with_gradients(f, a, weights) for f in (compiled, ours(8)))
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_odds_kernel_equals_its_twin_from_zero_to_minus_ten_thousand(dtype):
    x = torch.cat([torch.tensor([0.0, -1e-38, -2e-8, -0.6931, -1e4]), -torch.logspace(-12, 3, 300)]).to(dtype)
    results = []
    for module in (odds, reference):
        chosen, rejected = x.clone().requires_grad_(), x.flip(0).clone().requires_grad_()
        ratio = module.log_odds_ratio(chosen, rejected)
        results.append((ratio, *torch.autograd.grad(-F.logsigmoid(ratio).sum(), (chosen, rejected))))
    for found, plain in zip(*results, strict=True):
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, plain, rtol=2e-6, atol=1e-6)


def test_tensors_that_lie_across_are_taken():
    """hidden, head and its adapter as the transposes of what is stored."""
    draw = torch.Generator().manual_seed(0)
    stored = [torch.randn(*shape, generator=draw).T for shape in ((8, 5), (8, 33), (2, 5), (2, 33))]
    results = []
    for given in (stored, [x.contiguous() for x in stored]):
        hidden, head, low, up = (x.detach().requires_grad_() for x in given)
        logp = logprob.token_logprob(hidden, head, torch.tensor([0, 7, 32, 7, 1]), low=low, up=up, tile=9)
        results.append((logp, *torch.autograd.grad((logp * torch.arange(1, 6)).sum(), (hidden, head, low, up))))
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def test_preference_terms_equal_their_twin_and_use_one_launch(monkeypatch):
    edges = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6, 6, *range(7, 600), *range(9, 400)])
    starts = torch.tensor([0, 3, 7, 9, 10, 10, 10, 603, len(edges)])
    launches, kernel = [], odds._terms_kernel

    class Counting:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    monkeypatch.setattr(odds, "_terms_kernel", Counting())
    results = []
    for module in (odds, reference):
        logp = (-torch.rand(600, generator=torch.Generator().manual_seed(1)) * 5).requires_grad_()
        terms = module.preference_terms(logp, edges, starts)
        results.append((*terms, torch.autograd.grad((terms.term * torch.arange(1, 5)).sum(), logp)[0]))
    assert len(launches) == 1
    for found, plain in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)


def met_logprob(hidden, head, labels, low, up):
    """log p(label) and its gradients of hidden, low and up from walks over parts of the head, one of them of no rows."""
    cuts, grad = [0, 5, 5, 33, len(head)], torch.linspace(-1, 1, len(hidden), dtype=torch.float64)
    parts = [slice(*ends) for ends in pairwise(cuts)]
    walks = [kernels.part_walk(hidden, head[at], labels - at.start, True, low, up[at]) for at in parts]
    level = torch.stack([walk.level for walk in walks]).double()
    scales = (level - level.amax(0)).exp()
    total = sum(scale * walk.total for scale, walk in zip(scales, walks, strict=True))
    label_logit = sum(walk.label_logit for walk in walks)
    margin = label_logit - level.amax(0) - total.log()
    logp, unsure = F.logsigmoid(margin), torch.sigmoid(-margin)
    ways = [
        (
            own[labels]
            - sum(scale[:, None] * walk[at] for scale, walk in zip(scales, walks, strict=True)) / total[:, None]
        )
        * (unsure * grad)[:, None]
        for at, own in ((3, head), (4, up))
    ]
    known = logp.to(label_logit), label_logit, grad.to(label_logit)
    d_up = [kernels.part_gradient(hidden, head[at], low, up[at], labels - at.start, *known) for at in parts]
    return {"logp": logp, "hidden": ways[0], "low": ways[1], "up": torch.cat(d_up)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_of_a_head_together_know_what_the_whole_head_knows(dtype):
    a, weights = arguments(11, 9, 60, r=3, dtype=dtype), torch.linspace(-1, 1, 11, dtype=torch.float64)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    found = met_logprob(**a)
    assert worst(found, {name: truth[name] for name in found}) < LIMITS[dtype]


ENDS = {
    "one": torch.tensor([1]),
    "causal": torch.full((47,), 47),
    "pair": torch.tensor(pair(70, 30, 41)),
    "packed": torch.cat([torch.tensor(pair(30, 20, 10)), 60 + torch.tensor(pair(65, 5, 3))]),
    "forest": forest(133, 0.3),
    "strangers": torch.arange(1, 71),
}


def attended(module, end, q, k, v, weights):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = module(*leaves, end)
    return dict(
        zip(("out", "q", "k", "v"), (out.detach(), *torch.autograd.grad((out * weights).sum(), leaves)), strict=True)
    )


def kernel_attention(q, k, v, end):
    return attention.tree_attention(q, k, v, attention.tree_layout(end))


def compared(end, d, heads=2, groups=1, dtype=torch.float32):
    draw = torch.Generator().manual_seed(d)
    q, k, v, w = (torch.randn(len(end), n, d, generator=draw).to(dtype) for n in (heads, groups, groups, heads))
    truth = attended(true_attention, end, *(x.double() for x in (q, k, v, w)))
    return worst(attended(kernel_attention, end, q, k, v, w), truth)


@pytest.mark.parametrize("name", list(ENDS))
def test_tree_attention_and_its_gradients_equal_the_truth_on_every_kind_of_forest(name):
    assert compared(ENDS[name], 16) < 1e-5


@pytest.mark.parametrize(("d", "heads", "groups"), [(64, 3, 1), (80, 2, 2), (128, 2, 1), (16, 4, 2), (7, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tree_attention_takes_every_head_width_and_group(d, heads, groups, dtype):
    assert (
        compared(torch.tensor(pair(20, 30, 17)), d, heads, groups, dtype)
        < {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    )


def test_attention_depends_on_nothing_that_was_never_written():
    """Memory that is handed out holds numbers that are none."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert all(compared(torch.full((tokens,), tokens), 80, 2, 1) < 1e-5 for tokens in (1, 17, 67, 129))
    finally:
        torch.use_deterministic_algorithms(False)


def test_heads_that_lie_in_one_product_of_q_k_and_v_need_no_copy():
    together, end = torch.randn(67, 4 * 16), torch.tensor(pair(20, 30, 17))
    q, k, v = (x.unflatten(1, (-1, 16)) for x in together.split([32, 16, 16], dim=1))
    assert attention.heads_together(q) is q
    torch.testing.assert_close(kernel_attention(q, k, v, end), true_attention(q, k, v, end), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("queries", [(attention.QUERIES, attention.KEYS), (8, 4)])
def test_the_layout_visits_what_is_seen_and_masks_what_is_not_seen_whole(queries):
    for end in (*ENDS.values(), forest(300, 0.05, 3), torch.tensor(pair(300, 100, 113))):
        at = torch.arange(len(end))
        seen = (at <= at[:, None]) & (at[:, None] < end)
        kinds = attention._kinds(end, *queries)
        for i, row in enumerate(seen.split(queries[0])):
            for j, block in enumerate(row.split(queries[1], dim=1)):
                assert not block.any() or kinds[i, j] < 2
                assert kinds[i, j] != 0 or (block.all() and block.shape[1] == queries[1])


def test_the_layout_skips_the_blocks_between_branches():
    """Two answers of 512 tokens behind a prompt of 512: no query of the second meets a key of the first."""
    layout = attention.tree_layout(torch.tensor(pair(512, 512, 512)))
    causal = attention.tree_layout(torch.full((1536,), 1536))
    visits = layout.of_queries.some.sum().item(), causal.of_queries.some.sum().item()
    blocks = (512 // attention.QUERIES) * (512 // attention.KEYS)
    assert visits[1] - visits[0] == blocks
    assert causal.of_keys.some.sum() - layout.of_keys.some.sum() == blocks


def step_gap(heads, groups, d, dtype):
    """How far a step and what it writes into the cache are from the twin in float64: rows that begin in the first, the
    second and the last part of the columns, q, k and v out of one product; what no row sees is not a number."""
    draw, columns = torch.Generator().manual_seed(0), 300
    together, cos, sin, keys, values = (
        torch.randn(*shape, generator=draw).to(dtype)
        for shape in ((3, heads + 2 * groups, d), *2 * ((3, 1, d // 2),), *2 * ((3, groups, columns, d),))
    )
    first, column, gaps = torch.tensor([0, 133, 270]), torch.arange(columns), []
    for now in (torch.tensor([270]), torch.tensor([299])):
        unseen = (column < first[:, None]) | (column >= now)
        cache = [held.masked_fill(unseen[:, None, :, None], float("nan")) for held in (keys, values)]
        true = [held.masked_fill(unseen[:, None, :, None], 0.0).double() for held in (keys, values)]
        given = [*together.split([heads, groups, groups], dim=1), cos, sin]
        found = kernels.step_attention(*given, *cache, first, now)
        wanted = reference.step_attention(*(x.double() for x in given), *true, first, now)
        new = [(held[:, :, int(now)], one[:, :, int(now)]) for held, one in zip(cache, true, strict=True)]
        assert all(torch.equal(held.isnan().any(-1)[:, 0], unseen & (column != now)) for held in cache)
        gaps += [((one.double() - two).norm() / two.norm()).item() for one, two in ((found, wanted), *new)]
    return max(gaps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "groups", "d"), [(6, 2, 16), (3, 3, 10), (4, 1, 32)])
def test_a_step_on_a_cache_and_what_it_writes_equal_its_twin(heads, groups, d, dtype):
    assert step_gap(heads, groups, d, dtype) < {torch.float32: 2e-6, torch.float16: 2e-3}[dtype]


@pytest.mark.parametrize("span", [16, 300])
def test_a_step_is_cut_into_many_parts_or_one(monkeypatch, span):
    monkeypatch.setattr(step, "SPAN", span)
    assert step_gap(6, 2, 16, torch.float32) < 2e-6


@triton.jit
def _faulty_log_sigmoid(x):
    value, slope = exact.log_sigmoid(x)
    return value, slope * 1.01


@triton.jit
def _faulty_one_minus_exp(y):
    return 0.99 - tl.exp(y)


@triton.jit
def _faulty_seen(queries, keys, ends):
    return (keys <= queries) & (ends > 0)


@triton.jit
def _faulty_turned(x, at, inside, cos, sin, d: tl.constexpr):  # noqa: ARG001
    return tl.load(x + at, mask=inside, other=0.0)


@triton.jit
def _faulty_scale(row, width, factor, BLOCK: tl.constexpr):
    pass


@triton.jit
def _faulty_log_odds(logp, TINY: tl.constexpr):
    return logp - tl.log(1.001 - tl.exp(logp)), 1.0 / (1.001 - tl.exp(logp)) + TINY


@pytest.mark.parametrize(
    ("name", "fault"),
    [("log_sigmoid", _faulty_log_sigmoid), ("one_minus_exp", _faulty_one_minus_exp), ("_scale_row", _faulty_scale)],
)
def test_a_fault_in_a_kernel_of_log_p_fails_the_comparison(monkeypatch, name, fault):
    monkeypatch.setattr(logprob, name, fault)
    with pytest.raises(AssertionError):
        test_levels_that_rise_from_tile_to_tile_scale_the_sums(True)


def test_a_fault_in_the_mask_the_turning_or_the_odds_fails_the_comparison(monkeypatch):
    monkeypatch.setattr(attention, "_seen", _faulty_seen)
    assert compared(ENDS["pair"], 16) > 1e-2
    monkeypatch.setattr(step, "_turned", _faulty_turned)
    assert step_gap(6, 2, 16, torch.float32) > 1e-2
    monkeypatch.setattr(odds, "_log_odds", _faulty_log_odds)
    with pytest.raises(AssertionError):
        test_the_odds_kernel_equals_its_twin_from_zero_to_minus_ten_thousand(torch.float32)
