"""The plain twins against float64 truth with all logits written out, and their promises: error, memory, products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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
from mint.kernels import reference

token_logprob, log_odds_ratio = kernels.token_logprob, kernels.log_odds_ratio
SIZES = [(3, 7, 11, 4), (47, 33, 252, 100), (252, 16, 507, 7), (5, 3, 47, None), (2, 4, 1, None), (4, 8, 507, 506)]


def ours(tile=None):
    return lambda a: token_logprob(**a, tile=tile)


@pytest.mark.parametrize(("n", "d", "v", "tile"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_value_and_every_gradient_equal_the_truth_at_odd_sizes(n, d, v, tile, dtype):
    a, weights = arguments(n, d, v, r=3, bias=True, dtype=dtype), torch.linspace(-1, 1, n, dtype=torch.float64)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    assert worst(with_gradients(ours(tile), a, weights), truth) < (1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("tile", [None, 3])
def test_gradcheck_in_float64_with_bias_and_lora_on_the_head(tile):
    a = arguments(4, 5, 11, r=2, bias=True, dtype=torch.float64)
    names = [name for name in a if name != "labels"]
    leaves = [a[name].requires_grad_() for name in names]

    def value(*floats):
        return token_logprob(**dict(zip(names, floats, strict=True)), labels=a["labels"], tile=tile)

    assert torch.autograd.gradcheck(value, leaves)


def test_more_rows_than_walk_together_give_the_same(monkeypatch):
    a, weights = arguments(100, 8, 60, r=2), torch.ones(100)
    whole = with_gradients(ours(), a, weights)
    monkeypatch.setattr(reference.Walk, "rows", 33)
    assert worst(with_gradients(ours(), a, weights), {k: v.double() for k, v in whole.items()}) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, 250])
def test_the_error_is_no_larger_than_that_of_the_obvious_code_at_the_same_precision(dtype, tile):
    found, budget = {}, {}
    for seed in range(3):
        a, weights = arguments(256, 128, 2003, r=4, bias=True, dtype=dtype, seed=seed), torch.rand(256)
        truth = with_gradients(true_logprob, a, weights, torch.float64)
        for into, function in ((found, ours(tile)), (budget, obvious_logprob)):
            for name, (mean, largest) in errors(with_gradients(function, a, weights), truth).items():
                old = into.get(name, (0, 0))
                into[name] = (old[0] + mean / 3, max(old[1], largest))
    for name in found:
        assert found[name][0] <= 1.15 * budget[name][0], (name, found[name], budget[name])
        assert found[name][1] <= 3 * budget[name][1], (name, found[name], budget[name])  # one entry of thousands


def test_sums_over_many_tiles_in_bfloat16_are_kept_in_float32(monkeypatch):
    a, weights = arguments(64, 32, 4096, dtype=torch.bfloat16), torch.ones(64)
    truth = with_gradients(true_logprob, a, weights, torch.float64)["hidden"]

    def off(tile):
        return (with_gradients(ours(tile), a, weights)["hidden"].double() - truth).abs().mean().item()

    whole = off(None)
    assert off(16) <= 1.2 * whole
    gather = reference.Walk.gather

    def rounding(self, *given):
        gather(self, *given)
        self.sums.copy_(self.sums.bfloat16())

    monkeypatch.setattr(reference.Walk, "gather", rounding)
    assert off(16) > 2 * whole


@pytest.mark.parametrize("margin", [14, 16, 40, 80])
def test_log_p_and_its_gradient_keep_their_digits_near_one(margin):
    """Logits 30 + margin for the label, 30 elsewhere: log p = -log(1 + 2 exp(-margin)), where subtraction gives 0."""
    logits = torch.tensor([[30.0, 30.0 + margin, 30.0]], requires_grad=True)
    logp = token_logprob(logits, torch.eye(3), torch.tensor([1]), tile=1)
    logp.backward()
    left = 2 * torch.tensor(-float(margin), dtype=torch.float64).exp().item()
    assert logp.item() == pytest.approx(-left, rel=1e-5)
    assert logits.grad[0].tolist() == pytest.approx([-left / 2, left, -left / 2], rel=1e-5)


@pytest.mark.parametrize("label", [0, 3, 4, 7, 8, 9])
def test_a_label_at_the_border_of_a_tile_counts_once(label):
    a = arguments(1, 6, 10, dtype=torch.float64) | {"labels": torch.tensor([label])}
    truth = with_gradients(true_logprob, a, torch.ones(1), torch.float64)
    assert worst(with_gradients(ours(4), a, torch.ones(1)), truth) < 1e-12


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


def test_a_positive_log_probability_is_impossible():
    a = arguments(64, 32, 100, dtype=torch.bfloat16, scale=8)
    a["labels"] = (a["hidden"] @ a["head"].T).argmax(1)
    assert (token_logprob(**a) <= 0).all()


def test_no_rows_give_no_values_and_zero_gradients():
    hidden, head = torch.randn(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    out = token_logprob(hidden, head, torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0,)
    assert head.grad.eq(0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"labels": torch.tensor([0, 11])}, "outside 0..10"), ({"labels": torch.tensor([-100, 1])}, "-100"),
     ({"labels": torch.tensor([1])}, "labels"), ({"hidden": torch.zeros(2, 5)}, "head"), ({"tile": 0}, "at least one"),
     ({"head": torch.zeros(11, 4).bfloat16()}, r"one dtype; found hidden float32, head bfloat16.*head.to\(hidden.dtype\)"),
     ({"low": torch.zeros(2, 1)}, "low and up are the two halves"), ({"labels": torch.zeros(2)}, "labels are torch.float32"),
     ({"labels": torch.zeros(2).byte()}, "labels are torch.uint8; wanted int64")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        token_logprob(**(arguments(2, 4, 11) | change))


class Watch(TorchDispatchMode):
    """Counts products, and the elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten, onednn = torch.ops.aten, torch.ops.mkldnn._linear_pointwise
        self.products += func._overloadpacket in (aten.mm, aten.addmm, aten.addmm_, onednn)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, one.numel())
        return out


def test_nothing_but_logp_is_computed_when_nothing_needs_a_gradient():
    a = arguments(16, 8, 100)
    with Watch() as watch:
        token_logprob(**a, tile=50)
    assert watch.products == 2  # a tile, a product
    a["hidden"].requires_grad_()
    with Watch() as watch, torch.no_grad():
        token_logprob(**a, tile=50)
    assert watch.products == 2
    with Watch() as watch:
        token_logprob(**a, tile=50).sum().backward()
    assert watch.products == 4  # and one for the directions: backward has none
    a = arguments(16, 8, 100)
    a["head"].requires_grad_()
    with Watch() as watch:
        token_logprob(**a, tile=50).sum().backward()
    assert watch.products == 6  # a trained head alone needs no directions, but its logits again


def test_memory_is_bounded_by_the_tile_and_never_by_the_logits():
    a = arguments(64, 16, 20_000, bias=True)
    a["hidden"].requires_grad_()
    with Watch() as watch:
        token_logprob(**a, tile=100).sum().backward()
    assert watch.largest <= a["head"].numel()
    head = a["head"].detach()
    with Watch() as watch:
        token_logprob(a["hidden"], head, a["labels"], tile=100).sum().backward()
    assert watch.largest <= 64 * 100


def test_the_default_tile_keeps_memory_bounded_for_any_number_of_rows():
    width = reference.Walk.width
    assert all(min(n, 4096) * width(min(n, 4096), 128_256, None) <= 1 << 22 for n in (17, 1024, 4096, 100_000))
    assert width(1, 128_256, None) == 128_256
    assert width(4096, 300, None) == 300


@pytest.mark.parametrize("mutation", ["before", "share", "label", "unsure"])
def test_a_walk_with_one_fault_fails_the_comparison(monkeypatch, mutation):
    """An oracle must be able to see: each fault in the walk must break what the tests above compare."""
    fold, finish = reference.Walk.fold, reference.Walk.finish

    def faulty_fold(self, logits, first):
        kept = logits.clone()
        out = fold(self, logits, first)
        if mutation == "before":
            self.before = torch.ones_like(self.before)
        if mutation == "share":
            out = out * 1.01
        if mutation == "label":
            self.total = self.total + (kept.logsumexp(1) - self.level).exp() * 0.01
        return out

    def faulty_finish(self, head):
        if mutation == "unsure":
            self.total = self.total * 1.01
        return finish(self, head)

    a, weights = arguments(20, 8, 60, dtype=torch.float64), torch.ones(20)
    truth = with_gradients(true_logprob, a, weights, torch.float64)
    assert worst(with_gradients(ours(20), a, weights), truth) < 1e-12
    monkeypatch.setattr(reference.Walk, "fold", faulty_fold)
    monkeypatch.setattr(reference.Walk, "finish", faulty_finish)
    assert worst(with_gradients(ours(20), a, weights), truth) > 1e-3


def off_by(a, skip, tile):
    """The largest error of a row's directions over its bound skip (1 - p) max |W[j]|, and how much of the terms was used."""
    used, gather = [], reference.Walk.gather

    def noting(self, share, *rest):
        used.append(1.0 if self.kept is None else len(self.kept) / len(share))
        gather(self, share, *rest)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference.Walk, "gather", noting)
        for share in (0.0, skip):
            used.clear()
            found[share] = with_gradients(
                lambda a, s=share: token_logprob(**a, tile=tile, skip=s), a, torch.ones(len(a["hidden"]))
            )
    assert torch.equal(found[0.0]["logp"], found[skip]["logp"])
    left, worst_of_all = -torch.expm1(found[skip]["logp"]), 0.0
    for side, rows in (("hidden", "head"), ("low", "up")):
        gaps = (found[skip][side] - found[0.0][side]).norm(dim=1)
        bound = skip * left * a[rows].norm(dim=1).max()
        worst_of_all = max(worst_of_all, ((gaps - 1e-13) / bound).max().item())
    return worst_of_all, sum(used) / len(used)


@pytest.mark.parametrize("skip", [1e-6, 1e-2, 0.3])
@pytest.mark.parametrize("tile", [1, 7, 64])
def test_what_is_left_out_stays_within_its_bound_and_log_p_is_exact(skip, tile):
    a = arguments(40, 9, 509, r=3, dtype=torch.float64, scale=3.0)
    error, used = off_by(a, skip, tile)
    assert error <= 1
    assert used < 1


def test_many_tiles_that_each_weigh_little_are_not_all_left_out(monkeypatch):
    a = arguments(6, 4, 300, r=2, dtype=torch.float64, scale=1e-3)
    a["low"] *= 1e-3  # all classes weigh nearly the same,
    a["head"] += 1.0  # and what is left out adds up
    error, used = off_by(a, 0.05, 1)
    assert error <= 1
    assert 0.9 < used < 0.99
    real = reference.Walk.not_left_out

    def forgetful(self, mass):
        self.left_out = torch.zeros_like(mass)
        return real(self, mass)

    monkeypatch.setattr(reference.Walk, "not_left_out", forgetful)
    assert off_by(a, 0.05, 1)[0] > 2


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match="skip is 1"):
        token_logprob(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), skip=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_odds_ratio_and_its_slopes_equal_the_truth_from_one_to_minus_ten_thousand(dtype):
    chosen = -torch.logspace(-12, 4, 200, dtype=dtype)
    rejected = chosen.flip(0).clone().requires_grad_()
    chosen.requires_grad_()
    ratio = log_odds_ratio(chosen, rejected)
    ratio.sum().backward()
    c, r = chosen.detach().double(), rejected.detach().double()
    truth = (c - (-torch.expm1(c)).log()) - (r - (-torch.expm1(r)).log())
    torch.testing.assert_close(ratio.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(chosen.grad.double(), -1 / torch.expm1(c), rtol=1e-5, atol=0)
    torch.testing.assert_close(rejected.grad.double(), 1 / torch.expm1(r), rtol=1e-5, atol=0)


@pytest.mark.parametrize("x", [0.0, -1e-30, -1e-9, -2e-8])
def test_the_odds_have_a_finite_value_and_slope_at_probability_one(x):
    chosen, rejected = torch.tensor([x, -1.0, x], requires_grad=True), torch.tensor([-1.0, x, x], requires_grad=True)
    ratio = log_odds_ratio(chosen, rejected)
    (-F.logsigmoid(ratio)).sum().backward()
    assert torch.isfinite(ratio).all()
    assert torch.isfinite(chosen.grad).all()
    assert torch.isfinite(rejected.grad).all()


@pytest.mark.parametrize(("chosen", "rejected"), [(3, 1), (1, 3), ((2, 2), (2, 2))])
def test_odds_of_other_shapes_than_one_number_a_pair_are_refused(chosen, rejected):
    with pytest.raises(ValueError, match="one of each for a pair; found chosen"):
        log_odds_ratio(-torch.ones(chosen), -torch.ones(rejected))


def test_the_odds_of_one_third_and_one_half_can_be_worked_by_hand():
    """p = 1/3 has odds 1/2 and p = 1/2 has odds 1, so the ratio is 1/2; slopes are 3/2 and -2."""
    chosen, rejected = torch.tensor([1 / 3]).log().requires_grad_(), torch.tensor([0.5]).log().requires_grad_()
    ratio = log_odds_ratio(chosen, rejected)
    ratio.backward()
    assert ratio.exp().item() == pytest.approx(0.5)
    assert chosen.grad.item() == pytest.approx(1.5)
    assert rejected.grad.item() == pytest.approx(-2)


EDGES = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6, 6])
STARTS = torch.tensor([0, 3, 7, 9, 10, 10, 10])  # the third pair has two empty answers


def test_preference_terms_are_the_segmented_means_and_share_their_edges():
    logp = -torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    terms = kernels.preference_terms(logp, EDGES, STARTS)
    chosen, rejected = logp[[0, 1, 2]].mean(), logp[[0, 1, 3, 4]].mean()
    assert terms.chosen[0].item() == pytest.approx(chosen.item())
    assert terms.rejected[0].item() == pytest.approx(rejected.item())
    assert terms.log_odds[0].item() == pytest.approx(log_odds_ratio(chosen[None], rejected[None]).item())
    assert terms.term[2].item() == 0
    assert torch.autograd.gradcheck(lambda x: kernels.preference_terms(x, EDGES, STARTS).term, logp.requires_grad_())


@pytest.mark.parametrize(
    "end",
    [torch.tensor(pair(5, 3, 4)), torch.tensor([9] * 9), forest(30, 0.3), torch.tensor([1]), torch.arange(1, 8)],
    ids=["pair", "causal", "forest", "one", "strangers"],
)
def test_plain_tree_attention_sees_a_token_and_its_ancestors_alone(end):
    torch.manual_seed(0)
    q, k, v = (torch.randn(len(end), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    torch.testing.assert_close(reference.tree_attention(q, k, v, end), true_attention(q, k, v, end))
    if len(end) > 1:
        wrong = end.clone()
        wrong[0] = 1 if wrong[0] > 1 else 2
        assert not torch.allclose(reference.tree_attention(q, k, v, wrong), true_attention(q, k, v, end))
