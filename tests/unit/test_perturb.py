"""Projected gradient ascent: the ball, the box and known results."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robsparse.compute import perturb


def linear(weight):
    """Logits (0, w.x) of flattened images."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(len(weight), 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0] * len(weight), weight]))
    return model


def images(*rows):
    return torch.tensor(rows).view(len(rows), 1, 1, -1)


def ascend(model, x, start, y, *, eps=0.25, step_size=0.1, steps=1):
    loss = perturb.cross_entropy_of(torch.tensor(y))
    return perturb.ascend(model, x, start, loss, eps=eps, step_size=step_size, steps=steps)


# ---------------------------------------------------------------- known results


@pytest.mark.parametrize("label", [0, 1])
def test_one_step_by_hand(label):
    x = images([0.5, 0.5, 0.5])
    found = ascend(linear([2.0, -3.0, 0.0]), x, x, [label])
    # the loss of label 0 rises with w.x, that of label 1 falls; no gradient, no step
    up = 0.1 if label == 0 else -0.1
    assert torch.allclose(found, images([0.5 + up, 0.5 - up, 0.5]))


def test_enough_steps_reach_the_corner_of_ball_and_box():
    x = images([0.5, 0.9, 0.1, 0.0])
    found = ascend(linear([1.0, 1.0, -1.0, -1.0]), x, x, [0], steps=7)
    assert torch.allclose(found, images([0.75, 1.0, 0.0, 0.0]))


def test_step_starts_at_the_start_and_the_ball_is_around_the_image():
    x, start = images([0.5, 0.5]), images([0.7, 0.3])
    found = ascend(linear([1.0, 1.0]), x, start, [0])
    assert torch.allclose(found, images([0.75, 0.4]))  # 0.8 is cut at 0.75


def test_start_outside_the_ball_is_projected_by_the_first_step():
    x, start = images([0.5]), images([0.9])
    assert torch.allclose(ascend(linear([-1.0]), x, start, [0]), images([0.75]))


def test_images_do_not_influence_each_other():
    x = images([0.5, 0.5], [0.2, 0.8])
    model = linear([1.0, -2.0])
    together = ascend(model, x, x, [0, 1], steps=3)
    for i, label in enumerate((0, 1)):
        alone = ascend(model, x[i : i + 1], x[i : i + 1], [label], steps=3)
        assert torch.equal(together[i : i + 1], alone)


def test_result_inputs_and_parameters_have_no_gradient():
    model = linear([1.0, -1.0])
    x, start = images([0.5, 0.5]), images([0.6, 0.4])
    kept = x.clone(), start.clone()
    found = ascend(model, x, start, [0], steps=2)
    assert not found.requires_grad
    assert not x.requires_grad
    assert not start.requires_grad
    assert torch.equal(x, kept[0])
    assert torch.equal(start, kept[1])
    assert model[1].weight.grad is None


def test_an_empty_batch_does_not_call_the_network():
    def refuse(x):
        raise AssertionError

    x = torch.rand(0, 1, 2, 2)
    for norm in ("Linf", "L2"):
        loss = perturb.cross_entropy_of(torch.zeros(0, dtype=torch.int64))
        found = perturb.ascend(refuse, x, x, loss, eps=0.1, step_size=0.1, steps=2, norm=norm)
        assert found.shape == x.shape


def test_existing_gradients_of_parameters_are_not_changed():
    model = linear([1.0, -1.0])
    model[1].weight.grad = torch.full((2, 2), 7.0)
    x = images([0.5, 0.5])
    ascend(model, x, x, [0], steps=3)
    assert torch.equal(model[1].weight.grad, torch.full((2, 2), 7.0))


# ---------------------------------------------------------------- ball and box


@given(
    seed=st.integers(0, 10_000),
    eps=st.floats(1e-3, 1.0),
    relative=st.floats(0.01, 4.0),
    steps=st.integers(1, 5),
    uniform=st.booleans(),
)
def test_ascent_stays_in_ball_and_box(seed, eps, relative, steps, uniform):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(3, 1, 2, 2, generator=generator).round(decimals=1)  # 0 and 1 among them
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    start = (perturb.uniform_start if uniform else perturb.gaussian_start)(x, eps, generator)
    found = ascend(model, x, start, [0, 1, 2], eps=eps, step_size=relative * eps, steps=steps)
    assert (found - x).abs().max() <= eps + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1


@given(seed=st.integers(0, 10_000), eps=st.floats(0, 1.0))
def test_uniform_start_stays_in_ball_and_box(seed, eps):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(5, 1, 2, 2, generator=generator)
    start = perturb.uniform_start(x, eps, generator)
    assert (start - x).abs().max() <= eps + 1e-6
    assert start.min() >= 0
    assert start.max() <= 1


def test_uniform_start_fills_the_ball_evenly():
    x = torch.full((20_000,), 0.5)
    offset = perturb.uniform_start(x, 0.2, torch.Generator().manual_seed(0)) - x
    assert offset.min() < -0.199
    assert offset.max() > 0.199
    assert abs(offset.mean()) < 0.004
    assert float(offset.std()) == pytest.approx(0.4 / 12**0.5, rel=0.02)


def test_gaussian_start_is_a_thousandth_of_a_normal_draw_for_any_eps():
    x = torch.zeros(20_000)
    one, two = (
        perturb.gaussian_start(x, eps, torch.Generator().manual_seed(0)) for eps in (0.1, 0.9)
    )
    assert torch.equal(one, two)
    assert float(one.std()) == pytest.approx(0.001, rel=0.03)
    assert abs(one.mean()) < 3e-5


def test_starts_use_only_the_given_generator():
    x = torch.full((1, 1, 2, 2), 0.5)
    for start in (perturb.uniform_start, perturb.gaussian_start):
        before = torch.get_rng_state()
        first = start(x, 0.1, torch.Generator().manual_seed(1))
        assert torch.equal(first, start(x, 0.1, torch.Generator().manual_seed(1)))
        assert not torch.equal(first, start(x, 0.1, torch.Generator().manual_seed(2)))
        assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- losses and modes


def test_losses_are_sums_so_that_the_batch_size_does_not_matter():
    logits, y = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 1])
    expected = -(F.log_softmax(logits, 1)[[0, 1], [0, 1]]).sum()
    assert perturb.cross_entropy_of(y)(logits) == pytest.approx(expected.item())
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    q = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    by_hand = (p * (p / q).log()).sum()
    assert perturb.divergence_from(p.log())(q.log()) == pytest.approx(by_hand.item())


def test_divergence_has_no_gradient_to_the_clean_output():
    clean = torch.tensor([[1.0, 2.0]], requires_grad=True)
    other = torch.tensor([[2.0, 1.0]], requires_grad=True)
    perturb.divergence_from(clean)(other).backward()
    assert clean.grad is None
    assert other.grad is not None


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_of_all_modules_are_restored(mode, fails):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()  # was already in eval mode
    before = [module.training for module in model.modules()]
    try:
        with perturb.batch_norm_mode(model, mode):
            assert all(module.training == (mode == "train") for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [module.training for module in model.modules()] == before


def test_only_trainable_parameters_are_trainable_again():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    with perturb.no_parameter_gradients(model):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == before


# ---------------------------------------------------------------- L2


def ascend_l2(model, x, start, y, *, eps, step_size, steps=1):
    loss = perturb.cross_entropy_of(torch.tensor(y))
    options = {"eps": eps, "step_size": step_size, "steps": steps, "norm": "L2"}
    return perturb.ascend(model, x, start, loss, **options)


def test_l2_step_by_hand_has_the_direction_of_the_gradient():
    x = images([0.5, 0.5, 0.5])
    found = ascend_l2(linear([3.0, -4.0, 0.0]), x, x, [0], eps=1.0, step_size=0.1)
    assert torch.allclose(found, images([0.56, 0.42, 0.5]))


def test_l2_steps_add_up_inside_the_ball_and_end_on_its_surface():
    x, model = images([0.5, 0.5], [0.5, 0.5]), linear([3.0, -4.0])
    inside = ascend_l2(model, x, x, [0, 1], eps=0.3, step_size=0.1, steps=2)
    assert torch.allclose(inside, images([0.62, 0.34], [0.38, 0.66]))
    beyond = ascend_l2(model, x, x, [0, 1], eps=0.3, step_size=0.1, steps=9)
    assert torch.allclose(beyond, images([0.68, 0.26], [0.32, 0.74]))


def test_l2_ball_is_around_the_image_and_not_around_the_start():
    x, start = images([0.5, 0.5]), images([0.5, 0.9])
    found = ascend_l2(linear([1.0, 0.0]), x, start, [0], eps=0.25, step_size=0.3)
    assert torch.allclose(found, images([0.65, 0.7]))  # (0.3, 0.4) shortened to 0.25


def test_l2_images_stay_in_the_box():
    x = images([0.9, 0.05])
    found = ascend_l2(linear([4.0, -3.0]), x, x, [0], eps=1.0, step_size=1.0)
    assert torch.allclose(found, images([1.0, 0.0]))


def test_l2_lengths_are_computed_for_each_image_in_any_shape():
    x = torch.full((2, 3, 2, 2), 0.5)
    change = torch.zeros_like(x)
    change[0, :, 0, 0] = torch.tensor([0.1, 0.2, 0.2])  # length 0.3
    change[1, 0, 1, 1] = 0.4
    assert torch.allclose(perturb._unit(change)[0], change[0] / 0.3)
    assert torch.allclose(perturb._unit(change)[1], change[1] / 0.4)
    shortened = perturb._project(change, 0.35)
    assert torch.equal(shortened[0], change[0])
    assert torch.allclose(shortened[1], change[1] * 0.35 / 0.4)
    assert torch.equal(perturb._unit(torch.zeros(1, 1, 1, 2)), torch.zeros(1, 1, 1, 2))
    assert float(perturb._unit(torch.full((1, 1, 1, 1), 1e-6))) == pytest.approx(1.0)


def test_l2_start_is_uniform_in_the_ball_of_each_image():
    # In 4 dimensions, the share 0.5^4 of the ball is inside half of the radius.
    x = torch.full((20_000, 1, 2, 2), 0.5)
    start = perturb.uniform_start(x, 0.4, torch.Generator().manual_seed(0), "L2")
    offset = (start - x).flatten(1)
    lengths = offset.norm(dim=1)
    assert float(lengths.max()) <= 0.4 + 1e-6
    assert float(lengths.max()) > 0.399
    assert float((lengths < 0.2).float().mean()) == pytest.approx(1 / 16, rel=0.1)
    assert float((lengths < 0.3).float().mean()) == pytest.approx(0.75**4, rel=0.05)
    assert float(offset.mean(0).abs().max()) < 0.01
    assert float(offset.std()) > 0.1


def test_l2_start_is_in_the_box_and_uses_only_the_generator():
    x = torch.rand(50, 1, 2, 2).round()
    starts = [
        perturb.uniform_start(x, 3.0, torch.Generator().manual_seed(seed), "L2")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    assert float(starts[0].min()) >= 0
    assert float(starts[0].max()) <= 1
    assert perturb.uniform_start(x[:0], 1.0, torch.Generator(), "L2").shape == (0, 1, 2, 2)


def test_l2_start_draws_directions_before_radii():
    """The bits of trained networks depend on this order."""
    x = torch.full((3, 1, 1, 2), 0.5)
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(x.shape, generator=generator)
    radius = torch.rand(3, generator=generator) ** 0.5
    direction = normal / normal.flatten(1).norm(dim=1).view(3, 1, 1, 1)
    expected = x + 0.1 * radius.view(3, 1, 1, 1) * direction
    found = perturb.uniform_start(x, 0.1, torch.Generator().manual_seed(5), "L2")
    assert torch.allclose(found, expected)
