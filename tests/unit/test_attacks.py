"""Helpers of attacks: the cache, batches that become smaller, tallies, progress."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.evaluation import attacks
from robsparse.evaluation.attacks import AttackContext, Outcome, Picture
from robsparse.evaluation.cache import Cache, network_digest
from robsparse.evaluation.tally import AttackProgress, Tally, correct_flags, in_batches

CPU = torch.device("cpu")


# ---------------------------------------------------------------- cache


def test_results_are_found_only_with_the_same_settings(tmp_path):
    cache = Cache(tmp_path / "cache", "network pgd 0.1")
    assert cache.get("one") is None
    cache.put("one", flags=np.array([True, False]), done=np.array(3))
    found = cache.get("one")
    assert found["flags"].tolist() == [True, False]
    assert int(found["done"]) == 3
    assert cache.get("other") is None
    assert Cache(tmp_path / "cache", "network pgd 0.2").get("one") is None
    assert Cache(tmp_path / "cache", "another pgd 0.1").get("one") is None


def test_damaged_result_is_not_used(tmp_path, capsys):
    cache = Cache(tmp_path, "network")
    cache.put("one", flags=np.ones(100))
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:50])
    assert cache.get("one") is None
    assert capsys.readouterr().out.startswith(f"{path}: damaged")


def test_file_with_a_pickle_is_not_read(tmp_path):
    cache = Cache(tmp_path, "network")
    cache.put("one", flags=np.ones(1))
    [path] = tmp_path.iterdir()
    with path.open("wb") as handle:
        np.savez(handle, flags=np.array([print], dtype=object))  # a pickle inside
    assert cache.get("one") is None


def test_full_disk_does_not_damage_the_earlier_result(tmp_path, monkeypatch):
    cache = Cache(tmp_path, "network")
    cache.put("one", flags=np.ones(3))

    def full(handle, **arrays):
        handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        cache.put("one", flags=np.zeros(3))
    assert cache.get("one")["flags"].tolist() == [1, 1, 1]
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_without_a_folder_stores_nothing():
    cache = Cache(None)
    cache.put("one", flags=np.ones(1))
    assert cache.get("one") is None


def test_digest_depends_on_weights_images_and_labels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2))
    part = Part(torch.rand(3, 1, 1, 2), torch.tensor([0, 1, 1]))
    first = network_digest(model, part, CPU)
    assert network_digest(model, part, CPU) == first
    assert network_digest(model, Part(part.x_NCHW, part.y_N.flip(0)), CPU) != first
    assert network_digest(model, Part(part.x_NCHW + 1e-6, part.y_N), CPU) != first
    with torch.no_grad():
        model[1].bias[0] += 1e-6
    assert network_digest(model, part, CPU) != first


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (7, 3), (6, 3), (2, 9)])
def test_batches_visit_every_image_once_in_order(count, size):
    seen = []
    in_batches(count, size, lambda where: seen.extend(range(count)[where]), print)
    assert seen == list(range(count))


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_out_of_memory_halves_the_batch_and_prints_a_line(fits):
    seen, reports = [], []

    def work(where: slice) -> None:
        if where.stop - where.start > fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        seen.append(where)

    in_batches(11, 8, work, reports.append)
    assert [i for where in seen for i in range(11)[where]] == list(range(11))
    assert max(where.stop - where.start for where in seen) <= fits
    assert reports[0] == "out of memory: batches of 4 images from here on"


def test_other_errors_and_a_batch_of_one_that_does_not_fit_are_raised():
    def broken(_: slice) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches(4, 2, broken, print)

    def full(_: slice) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    reports = []
    with pytest.raises(RuntimeError, match="allocate memory"):
        in_batches(4, 4, full, reports.append)
    assert len(reports) == 2  # 4 -> 2 -> 1


def test_clean_flags_are_correct_after_out_of_memory(capsys):
    class Small(nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise RuntimeError("can't allocate memory")
            return torch.stack([x.flatten(1).sum(1), torch.zeros(len(x))], 1)

    part = Part(torch.ones(7, 1, 1, 1), torch.tensor([0, 1] * 3 + [0]))
    assert correct_flags(Small(), part, 7, CPU).tolist() == [True, False] * 3 + [True]
    assert "out of memory" in capsys.readouterr().out


# ---------------------------------------------------------------- the tally


class Sum(nn.Module):
    """Class 1 if the sum of the pixels is above 1."""

    def forward(self, x):
        total = x.flatten(1).sum(1) - 1
        return torch.stack([-total, total], 1)


@pytest.mark.parametrize(("norm", "expected"), [("Linf", 0.4), ("L2", 0.5)])
def test_tally_of_three_images_by_hand(norm, expected):
    x = torch.tensor([[0.4, 0.4], [0.9, 0.9], [0.0, 0.0]]).view(3, 1, 1, 2)
    y = torch.tensor([0, 1, 0])
    tally = Tally(x, y, AttackContext(norm, 0.5, 0, 3, CPU))
    change = torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.0, 0.1]]).view(3, 1, 1, 2)
    tally.record(Sum(), slice(0, 3), x + change)
    assert tally.robust.tolist() == [False, True, True]
    assert tally.largest == pytest.approx(expected)
    assert tally.nans == 0
    assert list(tally.pictures) == [0]
    assert tally.pictures[0].predicted == 1
    tally.record(Sum(), torch.tensor([2]), x[2:] + torch.nan)
    assert tally.nans == 2
    other = Tally(x, y, tally.context)
    other.restore(tally.arrays())
    assert other.robust.tolist() == tally.robust.tolist()
    assert (other.largest, other.nans) == (tally.largest, 2)
    assert isinstance(other.pictures[0], Picture)
    assert torch.allclose(other.pictures[0].image, tally.pictures[0].image, atol=1e-3)


def test_outcome_is_restored_from_its_arrays(tmp_path):
    outcome = Outcome(
        {"one": torch.tensor([True, True]), "two": torch.tensor([True, False])},
        {"steps": 3},
        ["a warning"],
        max_perturbation=0.25,
        nan_count=1,
        distances=torch.tensor([torch.inf, 0.5]),
        pictures={1: Picture(torch.full((1, 2, 2), 0.5), 7)},
    )
    cache = Cache(tmp_path, "network")
    cache.put("whole", **outcome.arrays(12.5))
    found = Outcome.from_arrays(cache.get("whole"))
    assert list(found.components) == ["one", "two"]
    assert found.components["two"].tolist() == [True, False]
    assert (found.settings, found.warnings) == ({"steps": 3}, ["a warning"])
    assert (found.max_perturbation, found.nan_count) == (0.25, 1)
    assert found.distances.tolist() == [float("inf"), 0.5]
    assert found.pictures[1].predicted == 7
    assert torch.equal(found.pictures[1].image, outcome.pictures[1].image)
    assert found.earlier_seconds == 12.5
    assert Outcome.from_arrays(Outcome({}).arrays(0.0)) == Outcome({})


# ---------------------------------------------------------------- progress


def test_plain_log_has_images_robust_images_seconds_and_remaining_time(monkeypatch):
    now, reports = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = AttackProgress("apgd-ce", 40, reports.append)
    progress.bar.disable = True
    progress.update(10, 9)
    assert reports == []  # not a line for every batch
    now[0] = 120.0
    progress.update(20, 15)
    assert reports == ["apgd-ce: 20 of 40 images, 15 still robust, 20 s, about 20 s left"]
    now[0] = 140.0
    progress.update(40, 30)
    progress.close(30, 40)
    assert reports[1:] == ["apgd-ce: 30 of 40 still robust, 40.0 s"]


def test_missing_surrogate_is_an_error():
    with pytest.raises(LookupError, match="dense"):
        attacks.no_surrogate("dense")
    assert not issubclass(LookupError, UsageError)
