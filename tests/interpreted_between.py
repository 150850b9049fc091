"""Norm, rotation and SwiGLU as kernels in Triton's interpreter, against float64 truth; see interpreted.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from truth_of_kernels import errors, worst

from mint import kernels
from mint.kernels import between, fused

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2}


def drawn(*shapes, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def with_gradients(function, given, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in given]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weights).sum(), leaves)
    return {str(at): value for at, value in enumerate((out.detach(), *grads))}


def compared(ours, truth, given):
    """How far a piece and its gradients are from the truth."""
    return worst(with_gradients(ours, given), with_gradients(truth, given, torch.float64))


def norm(x, weight):
    return kernels.rms_norm(x, weight, 1e-5)


def true_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def sum_and_norm(x, added, weight):
    return torch.cat(kernels.add_rms_norm(x, added, weight, 1e-5))


def true_sum_and_norm(x, added, weight):
    return torch.cat([x + added, true_norm(x + added, weight)])


def true_swiglu(gates, up):
    return gates * torch.sigmoid(gates) * up


def turning(angles):
    """Ours, and the truth with the same rounded angles."""

    def ours(x):
        return kernels.rotate(x, *(f(angles).to(x.dtype) for f in (torch.cos, torch.sin)))

    def truth(x, dtype):
        cos, sin = (f(angles).to(dtype).double() for f in (torch.cos, torch.sin))
        left, right = x.chunk(2, dim=-1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)

    return ours, truth


def test_the_door_opens_to_the_kernels():
    assert kernels._backend(torch.zeros(1), "fused", between) is fused


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 7), (47, 252), (2, 1030)])
def test_a_norm_and_its_gradients_equal_the_truth_at_odd_sizes(n, d, dtype):
    assert compared(norm, true_norm, drawn((n, d), (d,), dtype=dtype)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("n", "d"), [(1, 1), (3, 7), (47, 252), (2, 1030)])
def test_a_sum_with_its_norm_and_their_gradients_equal_the_truth_at_odd_sizes(n, d, dtype):
    assert compared(sum_and_norm, true_sum_and_norm, drawn((n, d), (n, d), (d,), dtype=dtype)) < LIMITS[dtype]


def test_a_row_wider_than_a_program_is_crossed_in_steps(monkeypatch):
    monkeypatch.setattr(fused, "LARGEST", 16)
    assert compared(norm, true_norm, drawn((5, 77), (77,))) < 1e-12
    assert compared(sum_and_norm, true_sum_and_norm, drawn((5, 77), (5, 77), (77,))) < 1e-12


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("n", "f"), [(1, 1), (3, 7), (5, 1031)])
def test_swiglu_and_its_gradients_equal_the_truth_at_odd_sizes(n, f, dtype):
    assert compared(kernels.swiglu, true_swiglu, drawn((n, f), (n, f), dtype=dtype)) < LIMITS[dtype]


def test_parts_of_one_product_are_taken_without_a_copy():
    """q of q, k and v; gate and up side by side."""
    together, cos, sin = drawn((5, 7 * 14), (5, 1, 7), (5, 1, 7), dtype=torch.float32)
    q, gates, up = together[:, : 3 * 14].unflatten(1, (-1, 14)), *together.split(49, dim=1)
    with torch.no_grad():
        assert torch.equal(kernels.rotate(q, cos, sin), kernels.rotate(q.contiguous(), cos, sin))
        assert torch.equal(kernels.swiglu(gates, up), kernels.swiglu(gates.contiguous(), up.contiguous()))


def test_swiglu_of_huge_gates_is_finite():
    gates = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]])
    found = with_gradients(kernels.swiglu, [gates, torch.ones(1, 5)])
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["0"], torch.tensor([[0.0, 0.0, 0.0, 90.0, 1e4]]))


@pytest.mark.parametrize("dtype", list(LIMITS))
@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 2), (7, 3, 14), (3, 5, 80), (2, 33, 64)])
def test_a_rotation_and_its_gradient_equal_the_truth_at_odd_sizes(n, heads, d, dtype):
    ours, truth = turning(*drawn((n, 1, d // 2), seed=1))
    assert compared(ours, lambda x: truth(x, dtype), drawn((n, heads, d), dtype=dtype)) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_error_is_no_larger_than_that_of_the_plain_twins(dtype):
    (angles,) = drawn((40, 1, 8), seed=2)
    cases = {
        "sum and norm": (
            lambda p: lambda x, y, w: torch.cat(between.add_rms_norm(x, y, w, 1e-5, p)),
            true_sum_and_norm,
            [(40, 96), (40, 96), (96,)],
        ),
        "norm": (lambda p: lambda x, w: between.rms_norm(x, w, 1e-5, p), true_norm, [(40, 96), (96,)]),
        "swiglu": (lambda p: lambda a, b: between.swiglu(a, b, p), true_swiglu, [(40, 96), (40, 96)]),
        "rotation": (
            lambda p: lambda x: between.rotate(x, angles.cos().to(x), angles.sin().to(x), p),
            lambda x: turning(angles)[1](x, dtype),
            [(40, 3, 16)],
        ),
    }
    for name, (side, truth, shapes) in cases.items():
        given = drawn(*shapes, dtype=dtype)
        true = with_gradients(truth, given, torch.float64)
        found, budget = (errors(with_gradients(side(pieces), given), true) for pieces in (fused, between))
        for part in true:
            assert found[part][0] <= 1.2 * budget[part][0], (name, part)


def test_rows_that_lie_apart_and_a_frozen_weight_are_taken():
    x, weight = drawn((9, 40), (20,), dtype=torch.float32)
    part = x[:, ::2].detach().requires_grad_()
    kernels.rms_norm(part, weight, 1e-5).sum().backward()
    (wanted,) = torch.autograd.grad(true_norm(part, weight).sum(), part)
    torch.testing.assert_close(part.grad, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(kernels.rms_norm(part, weight, 1e-5), true_norm(part, weight))


def test_each_way_is_one_launch(monkeypatch):
    launches = []
    for name in ("_norm_kernel", "_norm_back_kernel", "_gate_kernel", "_gate_back_kernel", "_turn_kernel"):

        class Counting:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                launches.append(self.name)
                return self.kernel[grid]

        monkeypatch.setattr(fused, name, Counting(name, getattr(fused, name)))
    x, weight, up, heads, angles = drawn((3, 8), (8,), (3, 8), (3, 2, 4), (3, 1, 2), dtype=torch.float32)
    with_gradients(lambda x: kernels.rms_norm(x, weight, 1e-5), [x])
    with_gradients(lambda x, y: sum_and_norm(x, y, weight), [x, up])
    with_gradients(kernels.swiglu, [x, up])
    with_gradients(turning(angles)[0], [heads])
    assert launches == [
        *2 * ["_norm_kernel", "_norm_back_kernel"],
        "_gate_kernel",
        "_gate_back_kernel",
        *2 * ["_turn_kernel"],
    ]


@triton.jit
def _faulty_wide(x):
    return x.to(tl.float32) * 1.001


def test_a_fault_in_a_kernel_fails_the_comparison(monkeypatch):
    monkeypatch.setattr(fused, "_wide", _faulty_wide)
    given = drawn((3, 8), (3, 8), dtype=torch.float32)
    assert compared(kernels.swiglu, true_swiglu, given) > 1e-4
    real = fused.normalise_back
    monkeypatch.setattr(
        fused, "normalise_back", lambda grad, x, weight, scale, *rest: real(grad, x, weight, scale * 1.001, *rest)
    )
    assert compared(sum_and_norm, true_sum_and_norm, drawn((3, 8), (3, 8), (8,), dtype=torch.float32)) > 1e-4
    assert compared(norm, true_norm, drawn((3, 8), (8,), dtype=torch.float32)) > 1e-4
