"""Where training images come from: bytes where exact, the same batches wherever they lie."""

import pytest
import torch

from robsparse import batches
from robsparse.cells import Layout
from robsparse.datasets import Part
from robsparse.training import Trainer

CPU = torch.device("cpu")


def part_of(x_NCHW):
    return Part(x_NCHW, torch.arange(len(x_NCHW)))


@pytest.mark.parametrize("levels", batches.LEVELS)
def test_grey_levels_are_kept_as_bytes_and_come_back_to_the_bit(levels):
    x_NCHW = torch.arange(levels + 1).float().view(-1, 1, 1, 1).repeat(1, 1, 2, 2) / levels
    stored = batches.Stored.of(part_of(x_NCHW), CPU)
    assert (stored.x_NCHW.dtype, stored.levels) == (torch.uint8, levels)
    index = torch.randperm(levels + 1)
    images, labels = stored[index]
    assert images.dtype == torch.float32
    assert torch.equal(images, x_NCHW[index])
    assert torch.equal(labels, index)


def test_what_bytes_cannot_hold_stays_as_it_is():
    x_NCHW = torch.rand(5, 1, 2, 2)
    stored = batches.Stored.of(part_of(x_NCHW), CPU)
    assert stored.levels is None
    assert torch.equal(stored[torch.arange(5)][0], x_NCHW)


def test_all_black_images_are_bytes_of_photographs():
    stored = batches.Stored.of(part_of(torch.zeros(3, 1, 2, 2)), CPU)
    assert stored.levels == 255
    assert not stored[:][0].any()


@pytest.mark.parametrize(("free", "there"), [(10_000, True), (5_000, False)])
def test_images_that_do_not_fit_stay_off_the_gpu(monkeypatch, capsys, free, there):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: moved.append(where) or self)
    part = part_of(torch.rand(10, 1, 10, 10))  # 4,000 bytes
    batches.Stored.of(part, torch.device("cuda"))
    assert [device.type for device in moved] == ["cuda" if there else "cpu"] * 2
    assert ("stay off the GPU" in capsys.readouterr().out) != there


def test_an_epoch_is_the_same_from_bytes_and_from_floats(study_data, load_study, tmp_path):
    study_data["training"]["augmentation"] = {"kind": "shift", "shift": 0.1, "flip": True}
    study = load_study(study_data)
    trainer = Trainer(study, study.cells()[0], Layout(tmp_path), CPU)
    made = trainer.batches
    assert made.train.x_NCHW.dtype == torch.uint8
    from_bytes = [batches.mixed(made.epoch(3), step) for step in range(made.steps)]
    made.train = batches.Stored(*made.train[:], None)
    from_floats = [batches.mixed(made.epoch(3), step) for step in range(made.steps)]
    for (x, y), (other_x, other_y) in zip(from_bytes, from_floats, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
