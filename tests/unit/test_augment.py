"""Shifts, crops and flips by hand, and what they depend on."""

import pytest
import torch
from scipy import stats

from robsparse.schema.imagesets import Augmentation
from robsparse.training import augment
from robsparse.training.augment import Draws

SHIFT, CROP = Augmentation(kind="shift"), Augmentation(kind="crop", padding=2)
KEPT = torch.zeros(1, dtype=torch.bool)


def moved(x, down, right, settings=SHIFT):
    return augment.apply(x, Draws(torch.tensor([[down, right]]), KEPT), settings)


def test_shift_by_whole_pixels_repeats_the_edge():
    x = torch.rand(1, 2, 5, 10)
    torch.testing.assert_close(moved(x, 1 / 5, 0.0)[:, :, :-1], x[:, :, 1:])
    torch.testing.assert_close(moved(x, 1 / 5, 0.0)[:, :, -1], x[:, :, -1])
    torch.testing.assert_close(moved(x, 0.0, -2 / 10)[..., 2:], x[..., :-2])
    torch.testing.assert_close(moved(x, 0.0, -2 / 10)[..., 0], x[..., 0])
    torch.testing.assert_close(moved(x, 0.0, 0.0), x)


def test_shift_by_half_a_pixel_is_the_mean_of_two_pixels():
    ramp = torch.arange(8.0).expand(1, 1, 3, 8) / 10
    expected = torch.tensor([0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.0]) / 10
    torch.testing.assert_close(moved(ramp, 0.0, 0.5 / 8)[0, 0], expected.expand(3, 8))


def test_crop_equals_a_slow_crop_of_single_images():
    x, generator = torch.rand(20, 3, 5, 7), torch.Generator().manual_seed(0)
    draws = augment.draw(20, CROP, generator)
    assert set(draws.offset_N2.flatten().tolist()) == {-2, -1, 0, 1, 2}
    found = augment.apply(x, draws, CROP)
    for image, out, (down, right) in zip(x, found, draws.offset_N2.tolist(), strict=True):
        padded = torch.zeros(3, 9, 11)
        padded[:, 2:7, 2:9] = image
        assert torch.equal(out, padded[:, 2 + down : 7 + down, 2 + right : 9 + right])


def test_flip_mirrors_about_half_of_the_images():
    settings = Augmentation(flip=True)
    x, draws = torch.rand(400, 1, 2, 3), augment.draw(400, settings, torch.Generator())
    found = augment.apply(x, draws, settings)
    assert torch.equal(found[draws.flip_N], x[draws.flip_N].flip(3))
    assert torch.equal(found[~draws.flip_N], x[~draws.flip_N])
    assert 160 < int(draws.flip_N.sum()) < 240


def test_without_augmentation_the_tensor_is_the_same():
    x = torch.rand(3, 1, 4, 4)
    draws = augment.draw(3, Augmentation(), torch.Generator())
    assert augment.apply(x, draws, Augmentation()) is x


@pytest.mark.parametrize("kind", ["shift", "crop"])
def test_an_image_does_not_depend_on_its_batch(kind):
    settings = Augmentation(kind=kind, flip=True)
    x = torch.rand(30, 3, 8, 8)
    draws = augment.draw(30, settings, torch.Generator().manual_seed(3))
    again = augment.draw(30, settings, torch.Generator().manual_seed(3))
    assert torch.equal(draws.offset_N2, again.offset_N2)
    whole = augment.apply(x, draws, settings)
    index = torch.tensor([4, 17, 2])
    torch.testing.assert_close(augment.apply(x[index], draws[index], settings), whole[index])
    assert whole.min() >= 0
    assert whole.max() <= 1
    assert not torch.equal(whole, x)


def test_shifts_are_uniform_up_to_a_tenth_of_the_side():
    offsets = augment.draw(3000, SHIFT, torch.Generator().manual_seed(0)).offset_N2
    for axis in offsets.T:
        assert stats.kstest(axis.numpy(), stats.uniform(-0.1, 0.2).cdf).pvalue > 0.01
