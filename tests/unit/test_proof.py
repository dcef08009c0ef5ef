"""Comparison of the outputs and gradients of two computations."""

import pytest
import torch

from robsparse.fast import proof
from robsparse.fast.proof import Passes

PLAIN = Passes(torch.tensor([[1.0, -4.0]]), torch.tensor([[3.0, 4.0]]))


def with_outputs(*values):
    return PLAIN._replace(outputs=torch.tensor([values]))


def with_gradient(*values):
    return PLAIN._replace(gradient=torch.tensor([values]))


ALIKE = {
    "the same": PLAIN,
    "outputs within 1e-4 of the largest": with_outputs(1.0 + 3e-4, -4.0),
    "gradients within 5 % of their length": with_gradient(3.0, 4.2),
}
APART = {
    "another shape": (with_outputs(1.0), "outputs of shape (1, 1), not (1, 2)"),
    "outputs beyond the limit": (with_outputs(1.0 + 5e-4, -4.0), "outputs differ by 0.0005"),
    "one NaN": (with_outputs(float("nan"), -4.0), "outputs differ by nan"),
    "gradients beyond the limit": (with_gradient(3.0, 4.3), "gradients differ by 0.3"),
}


@pytest.mark.parametrize("case", ALIKE)
def test_rounding_is_not_a_difference(case):
    assert proof.difference(PLAIN, ALIKE[case]) == ""


@pytest.mark.parametrize("case", APART)
def test_difference_is_described_in_words(case):
    fast, words = APART[case]
    assert proof.difference(PLAIN, fast).startswith(words)


@pytest.mark.parametrize("side", ["plain", "fast"])
def test_gradients_are_compared_if_both_sides_have_one(side):
    sides = {"plain": PLAIN, "fast": with_gradient(0.0, 0.0)}
    sides[side] = sides[side]._replace(gradient=None)
    assert proof.difference(**sides) == ""


def test_limit_depends_on_the_precision_of_the_passes():
    fast = with_outputs(1.2, -4.0)
    assert proof.difference(PLAIN, fast) != ""
    assert proof.difference(PLAIN, fast, torch.bfloat16) == ""


def test_type_without_a_limit_must_agree_exactly():
    plain = Passes(PLAIN.outputs.half(), None)
    assert proof.difference(plain, plain) == ""
    assert proof.difference(plain, plain._replace(outputs=plain.outputs + 0.01)) != ""


def test_empty_outputs_agree():
    nothing = Passes(torch.zeros(0, 2), torch.zeros(0, 2))
    assert proof.difference(nothing, nothing) == ""


def test_pass_gives_outputs_and_the_gradient_of_a_fixed_sum_of_them():
    weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]], requires_grad=True)
    x = torch.tensor([[1.0, 1.0]])
    found = proof.passes(lambda images: images @ weight, x, gradient=True)
    assert torch.equal(found.outputs, torch.tensor([[1.0, 1.0]]))
    # The weights of the two outputs are -1 and 1.5.
    assert torch.equal(found.gradient, torch.tensor([[2.0, -1.5]]))
    assert weight.grad is None
    assert not found.outputs.requires_grad
    plain = proof.passes(lambda images: images @ weight, x, gradient=False)
    assert plain.gradient is None
    assert not x.requires_grad
