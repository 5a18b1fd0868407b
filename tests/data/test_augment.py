"""Augmentation: elementwise against what is expected, and the same in every batch."""

import pytest
import torch

from fromzero.data import Augmentation
from fromzero.data.order import keyed_uniform

IMAGES = torch.rand(16, 3, 9, 14, generator=torch.Generator().manual_seed(0))
SAMPLES = torch.arange(100, 116)


def test_without_options_images_stay_as_they_are_to_the_bit():
    assert torch.equal(Augmentation()(IMAGES, SAMPLES, seed=0, epoch=0), IMAGES)


def test_a_flip_mirrors_about_half_of_the_images_to_the_bit():
    mirrored = keyed_uniform(3, 1, SAMPLES, 4)[:, 3] < 0.5
    assert 2 < int(mirrored.sum()) < 14
    out = Augmentation(flip=True)(IMAGES, SAMPLES, seed=3, epoch=1)
    assert torch.equal(out[mirrored], IMAGES[mirrored].flip(-1)) and torch.equal(out[~mirrored], IMAGES[~mirrored])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_an_images_change_does_not_depend_on_its_batch(size, dtype):
    augment, images = Augmentation(shift=0.2, rotate=30, flip=True), IMAGES.to(dtype)
    whole = augment(images, SAMPLES, seed=0, epoch=4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    parts = torch.cat([augment(images[part], SAMPLES[part], seed=0, epoch=4) for part in order.split(size)])
    assert whole.dtype == dtype and torch.equal(whole[order], parts)


def test_another_epoch_seed_or_sample_changes_images_otherwise():
    augment = Augmentation(shift=0.2, rotate=30)
    base = augment(IMAGES, SAMPLES, seed=0, epoch=0)
    for other in (
        augment(IMAGES, SAMPLES, seed=1, epoch=0),
        augment(IMAGES, SAMPLES, seed=0, epoch=1),
        augment(IMAGES, SAMPLES + 50, seed=0, epoch=0),
    ):
        assert not torch.allclose(base, other)


def test_a_shift_moves_by_the_share_that_was_drawn():
    drawn = keyed_uniform(0, 0, SAMPLES, 4) * 2 - 1
    row = torch.arange(14, dtype=torch.float64).expand(16, 1, 14, 14).contiguous()  # a ramp: its value is its place
    out = Augmentation(shift=0.25)(row, SAMPLES, seed=0, epoch=0)
    for image, (_, x, _, _) in zip(out, drawn.tolist(), strict=True):
        torch.testing.assert_close(image[0, 7, 5:9], torch.arange(5, 9, dtype=torch.float64) + x * 0.25 * 14)


@pytest.mark.parametrize(("height", "width"), [(41, 41), (31, 61)])
def test_a_turn_keeps_shapes_and_never_passes_its_angle(height, width):
    spot = torch.zeros(16, 1, height, width, dtype=torch.float64)
    spot[:, 0, height // 2, width // 2 + 10] = 1.0
    out = Augmentation(rotate=30)(spot, SAMPLES, seed=0, epoch=0)
    angles = (keyed_uniform(0, 0, SAMPLES, 4)[:, 0] * 2 - 1) * 30
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) - height // 2, torch.arange(width, dtype=torch.float64) - width // 2, indexing="ij"
    )
    for image, angle in zip(out[:, 0], angles, strict=True):
        at_x, at_y = float((image * x).sum() / image.sum()), float((image * y).sum() / image.sum())
        assert (at_x**2 + at_y**2) ** 0.5 == pytest.approx(10, abs=0.5)  # in pixels, also where the image is not square
        assert -torch.rad2deg(torch.atan2(torch.tensor(at_y), torch.tensor(at_x))) == pytest.approx(float(angle), abs=3)
