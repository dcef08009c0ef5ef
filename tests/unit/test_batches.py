"""Training batches: images as bytes, order, extra images and augmentation."""

from dataclasses import replace

import pytest
import torch

from robsparse.datasets import Part
from robsparse.schema.training import Fit
from robsparse.study.cells import Layout, derive_seed
from robsparse.training import augment, batches
from robsparse.training.checkpoints import StopRequest
from robsparse.training.loop import train
from robsparse.training.resuming import RunState
from robsparse.training.session import prepare_session
from robsparse.training.stages import Stage

CPU = torch.device("cpu")


def part_of(x_NCHW):
    return Part(x_NCHW, torch.arange(len(x_NCHW)))


@pytest.mark.parametrize("levels", batches.LEVELS)
def test_grey_levels_are_stored_as_bytes_and_restored_to_the_same_bits(levels):
    x_NCHW = torch.arange(levels + 1).float().view(-1, 1, 1, 1).repeat(1, 1, 2, 2) / levels
    stored = batches.Stored.from_part(part_of(x_NCHW), CPU)
    assert (stored.x_NCHW.dtype, stored.levels) == (torch.uint8, levels)
    index = torch.randperm(levels + 1)
    images, labels = stored[index]
    assert images.dtype == torch.float32
    assert torch.equal(images, x_NCHW[index])
    assert torch.equal(labels, index)


def test_images_that_bytes_cannot_represent_stay_floats():
    x_NCHW = torch.rand(5, 1, 2, 2)
    stored = batches.Stored.from_part(part_of(x_NCHW), CPU)
    assert stored.levels is None
    assert torch.equal(stored[torch.arange(5)][0], x_NCHW)


def test_all_black_images_are_bytes_of_photographs():
    stored = batches.Stored.from_part(part_of(torch.zeros(3, 1, 2, 2)), CPU)
    assert stored.levels == 255
    assert not stored[:][0].any()


@pytest.mark.parametrize(("free", "there"), [(10_000, True), (5_000, False)])
def test_images_that_do_not_fit_stay_off_the_gpu(monkeypatch, capsys, free, there):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**6))
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, where: moved.append(where) or self)
    part = part_of(torch.rand(10, 1, 10, 10))  # 4,000 bytes
    batches.Stored.from_part(part, torch.device("cuda"))
    assert [device.type for device in moved] == ["cuda" if there else "cpu"] * 2
    assert ("stay off the GPU" in capsys.readouterr().out) != there


def test_an_epoch_is_the_same_from_bytes_and_from_floats(study_data, load_study, tmp_path):
    study_data["training"]["augmentation"] = {"kind": "shift", "shift": 0.1, "flip": True}
    study = load_study(study_data)
    made = prepare_session(study, study.cells()[0], Layout(tmp_path), CPU).batches
    assert made.train.x_NCHW.dtype == torch.uint8
    from_bytes = [made.epoch(3).batch(step) for step in range(made.steps)]
    made.train = batches.Stored(*made.train[:], None)
    from_floats = [made.epoch(3).batch(step) for step in range(made.steps)]
    for (x, y), (other_x, other_y) in zip(from_bytes, from_floats, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


# ---------------------------------------------------------------- the images of a batch


def numbered(n):
    """8x8 images. All pixels of image i are i / 1000."""
    return Part(torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8) / 1000, torch.arange(n))


@pytest.fixture
def make_batches(study_data, load_study):
    """make_batches(train, extra, **training) -> the batches of the first cell of a study."""

    def make(train, extra=None, seed=0, **training):
        study_data["grid"]["seeds"] = [0, 1]
        study_data["training"] |= {"augmentation": {"kind": "none"}} | training
        if extra is not None:
            study_data["training"]["synthetic_file"] = __file__  # the images are given
        study = load_study(study_data)
        cell = replace(study.cells()[0], seed=seed)
        return batches.Batches(cell, study.planned[cell], train, extra, CPU)

    return make


def labels_of(made, epoch):
    return [made.epoch(epoch).batch(step)[1].tolist() for step in range(made.steps)]


def test_an_epoch_uses_each_image_once_and_drops_the_last_partial_batch(make_batches):
    made = make_batches(numbered(70), batch_size=16)
    assert (made.size, made.steps, made.extra_size) == (16, 4, 0)
    taken = labels_of(made, 0)
    assert [len(labels) for labels in taken] == [16] * 4
    assert len({label for labels in taken for label in labels}) == 64
    images, labels = made.epoch(0).batch(1)
    assert torch.equal(images[:, 0, 0, 0], labels / 1000)
    assert len(made.epoch(0).sources) == 1


def test_order_depends_only_on_seed_and_epoch(make_batches):
    one, same, other = (make_batches(numbered(70), batch_size=16, seed=s) for s in (0, 0, 1))
    assert labels_of(one, 2) == labels_of(same, 2)
    assert labels_of(one, 2) != labels_of(one, 3)
    assert labels_of(one, 2) != labels_of(other, 2)
    generator = torch.Generator().manual_seed(derive_seed("order", "digits", 0, 2))
    assert labels_of(one, 2)[0] == torch.randperm(70, generator=generator)[:16].tolist()


def test_batch_is_no_larger_than_the_data(make_batches):
    made = make_batches(numbered(5), batch_size=16)
    assert (made.size, made.steps) == (5, 1)


def test_extra_images_fill_their_share_and_are_repeated(make_batches):
    labelled, extra = numbered(60), Part(numbered(7).x_NCHW, torch.arange(900, 907))
    made = make_batches(labelled, extra, batch_size=10, synthetic_fraction=0.38)
    assert (made.size, made.extra_size, made.steps) == (7, 3, 8)
    taken = labels_of(made, 0)
    assert all(max(labels[:7]) < 60 and min(labels[7:]) >= 900 for labels in taken)
    rounds = [label for labels in taken for label in labels[7:]]
    assert sorted(rounds[:7]) == sorted(rounds[7:14]) == list(range(900, 907))
    assert rounds[:7] != rounds[7:14]
    assert len(rounds) == 24


def test_extra_images_without_a_share_are_not_used(make_batches):
    made = make_batches(numbered(60), numbered(7), batch_size=10, synthetic_fraction=0.01)
    assert (made.size, made.extra_size) == (10, 0)
    assert len(made.epoch(0).sources) == 1


def test_augmentation_differs_between_epochs_and_kinds_of_images(make_batches):
    augmentation = {"kind": "shift", "shift": 0.25, "flip": True}
    made = make_batches(
        numbered(40), numbered(40), batch_size=20, synthetic_fraction=0.5, augmentation=augmentation
    )
    own, extra = made.epoch(0).sources
    later, _ = made.epoch(1).sources
    assert torch.equal(own.draws.offset_N2, made.epoch(0).sources[0].draws.offset_N2)
    assert not torch.equal(own.draws.offset_N2, later.draws.offset_N2)
    assert not torch.equal(own.draws.offset_N2, extra.draws.offset_N2)
    generator = torch.Generator().manual_seed(derive_seed("augment", "order", "digits", 0, 0))
    drawn = augment.draw(40, made.augmentation, generator)
    assert torch.equal(own.draws.offset_N2, drawn.offset_N2)
    assert torch.equal(own.draws.flip_N, drawn.flip_N)


def test_augmentation_of_an_image_does_not_depend_on_its_position(make_batches):
    made = make_batches(numbered(40), batch_size=8, augmentation={"kind": "shift", "shift": 0.25})
    source = made.epoch(0).sources[0]
    x, labels = source.batch(2)
    index = source.order[16:24]
    assert torch.equal(labels, index)
    expected = augment.apply(made.train[index][0], source.draws[index], made.augmentation)
    assert torch.equal(x, expected)


def test_augmentation_of_the_training_overrides_that_of_the_data(study_data, load_study):
    study_data["datasets"]["digits"]["augmentation"] = {"kind": "shift", "shift": 0.2}
    study_data["training"].pop("augmentation", None)
    study = load_study(study_data)
    cell, planned = next(iter(study.planned.items()))
    made = batches.Batches(cell, planned, numbered(70), None, CPU)
    assert made.augmentation.shift == 0.2
    study_data["training"]["augmentation"] = {"kind": "none"}
    study = load_study(study_data)
    cell, planned = next(iter(study.planned.items()))
    made = batches.Batches(cell, planned, numbered(70), None, CPU)
    assert made.augmentation.kind == "none"


def test_a_training_run_uses_consecutive_epochs(study_data, load_study, tmp_path):
    """Epochs are counted over all stages. Order and augmentation depend on this number."""
    study_data["training"]["batch_size"] = 200
    study = load_study(study_data)
    (cell,) = (cell for cell in study.cells() if cell.method == "dense")
    stages = [Stage(Fit(epochs=2, lr=0.1)), Stage(Fit(epochs=3, lr=0.1))]
    session = replace(prepare_session(study, cell, Layout(tmp_path), CPU), stages=stages)
    asked, epoch = [], session.batches.epoch
    session.batches.epoch = lambda index: asked.append(index) or epoch(index)
    train(session, RunState(session), StopRequest())
    assert asked == list(range(5))
