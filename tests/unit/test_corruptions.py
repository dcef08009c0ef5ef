"""Accuracy on common corruptions: generated images, files of images, and what is reported."""

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn

from robsparse import figures, models
from robsparse.base.errors import UsageError
from robsparse.collection import collect
from robsparse.datasets import Part, _corruptions
from robsparse.evaluation import corruptions
from robsparse.evaluation.evaluate import evaluate_cell
from robsparse.evaluation.record import summary
from robsparse.figures.data import corrupted, tidy
from robsparse.figures.data.statistics import accuracy_interval
from robsparse.figures.data.summary import make_material
from robsparse.figures.plots import corruptions as corruptions_plot
from robsparse.figures.plots import style
from robsparse.figures.tables import study_tables
from robsparse.networks import weights
from robsparse.records.evaluation_record import read_flags, read_record
from robsparse.schema.evaluation import Corruptions, Evaluation
from robsparse.study import fingerprints
from robsparse.study.cells import Layout

CPU = torch.device("cpu")
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 9, 12)]


def images(n, shape):
    """Smooth images in [0, 1]: a wave of another direction in each."""
    channels, height, width = shape
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [
        (0.5 + 0.45 * torch.sin((i % 3 + 1) * 6 * down / height + i * right / width + c))
        for i in range(n)
        for c in range(channels)
    ]
    return torch.stack(waves).view(n, *shape)


def examples(n=4, shape=(1, 8, 8)):
    return Part(images(n, shape), torch.arange(n) % 2)


def settings(**chosen):
    return Evaluation(
        n_examples=4,
        batch_size=3,
        selections={"last": ["clean"]},
        corruptions=Corruptions(**chosen),
    )


# ---------------------------------------------------------------- generated


@functools.cache
def made(shape, seed=0):
    return dict(corruptions.generated(examples(4, shape), seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_generated_images_are_8_bit_images_of_the_same_shape(shape):
    found = made(shape)
    assert set(found) == set(itertools.product(_corruptions.GENERATED, (1, 2, 3, 4, 5)))
    assert set(_corruptions.GENERATED) <= set(corruptions.PUBLISHED)
    for key, x in found.items():
        assert x.shape == (4, *shape), key
        assert x.dtype == torch.float32, key
        assert 0 <= float(x.min()) <= float(x.max()) <= 1, key
        torch.testing.assert_close(x * 255, (x * 255).round(), msg=str(key))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", _corruptions.GENERATED)
def test_a_corruption_of_severity_5_is_farther_away_than_one_of_severity_1(name, shape):
    x, found = images(4, shape), made(shape)
    apart = [float((found[name, severity] - x).abs().mean()) for severity in (1, 2, 3, 4, 5)]
    assert 0 < apart[0] < apart[4]
    assert apart[4] < 0.5


def test_random_draws_depend_on_the_seed_alone():
    torch.manual_seed(7)
    again = dict(corruptions.generated(examples(), 0))
    other = dict(corruptions.generated(examples(), 1))
    for key, x in made((1, 8, 8)).items():
        assert torch.equal(x, again[key])
    drawn = {name for name, s in other if not torch.equal(other[name, s], again[name, s])}
    assert drawn == {"gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog"}


def random():
    return np.random.default_rng(0)


def test_brightness_contrast_and_pixelate_by_hand():
    x = torch.tensor([0.1, 0.3, 0.5, 0.7]).view(1, 1, 2, 2)
    brighter = _corruptions.brightness(x, 2, random()).flatten()
    torch.testing.assert_close(brighter, torch.tensor([0.3, 0.5, 0.7, 0.9]))
    flatter = _corruptions.contrast(x, 4, random()).flatten()  # 0.3 of the distance from 0.4
    torch.testing.assert_close(flatter, torch.tensor([0.31, 0.37, 0.43, 0.49]))
    blocks = _corruptions.pixelate(x, 3, random()).flatten()  # one pixel is left
    torch.testing.assert_close(blocks, torch.full((4,), 0.4))


def test_noise_has_the_spread_that_it_says():
    x = torch.full((4, 3, 64, 64), 0.5)
    gaussian = _corruptions.gaussian_noise(x, 3, random())
    assert float(gaussian.std()) == pytest.approx(0.12, rel=0.02)
    shot = _corruptions.shot_noise(x, 3, random())  # Poisson of mean 25, divided by 50
    assert float(shot.std()) == pytest.approx(5 / 50, rel=0.02)
    impulse = _corruptions.impulse_noise(x, 5, random())
    assert float((impulse == 0).float().mean()) == pytest.approx(0.09, rel=0.05)
    assert float((impulse == 1).float().mean()) == pytest.approx(0.09, rel=0.05)


def test_defocus_spreads_a_point_over_a_disk():
    x = torch.zeros(1, 1, 21, 21)
    x[0, 0, 10, 10] = 1
    spot = _corruptions.defocus_blur(x, 5, random())[0, 0]  # a radius of 2.6 pixels
    assert float(spot.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(spot, spot.T)
    assert float(spot[10, 10]) == pytest.approx(1 / (np.pi * 2.6**2), rel=0.03)
    assert float(spot[10, 12]) > float(spot[10, 13]) > 0 == float(spot[10, 14])


def test_motion_moves_by_whole_pixels_as_rolling_does():
    x = torch.rand(2, 3, 8, 10)
    moved = _corruptions._shifted(x, torch.tensor([1.0, 0.0]), torch.tensor([0.0, -2.0]))
    torch.testing.assert_close(moved[0, :, 1:], x[0, :, :-1])
    torch.testing.assert_close(moved[1, :, :, :-2], x[1, :, :, 2:])
    flat = torch.full((1, 1, 8, 8), 0.3)
    torch.testing.assert_close(_corruptions.motion_blur(flat, 5, random()), flat)


# ---------------------------------------------------------------- files


class Brightest(nn.Module):
    """Class 1 if the mean of the image is above a half; no weights."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([torch.full_like(mean, 0.5), mean], 1)


def write_files(folder: Path, part: Part, stored=6, shape=(8, 8, 1)):
    """Images of the folder are black at odd severities, white at even ones."""
    folder.mkdir()
    labels = np.concatenate([part.y_N.numpy(), np.ones(stored - len(part), dtype=np.int64)])
    np.save(folder / "labels.npy", np.tile(labels, 5))
    images = np.zeros((5, stored, *shape), np.uint8)
    images[1::2] = 255
    for name in corruptions.PUBLISHED:
        np.save(folder / f"{name}.npy", images.reshape(-1, *shape))


def test_files_by_hand(tmp_path):
    part = Part(images(4, (1, 8, 8)), torch.tensor([0, 1, 1, 1]))
    write_files(tmp_path / "c", part)
    chosen = settings(folders={"digits": str(tmp_path / "c")})
    found = corruptions.measure(Brightest().eval(), part, chosen, "digits", CPU)
    assert {row["source"] for row in found.rows()} == {"files"}
    assert len(found.rows()) == 75
    for row in found.rows():
        assert row["n_examples"] == 4
        assert row["n_correct"] == (3 if row["severity"] in (2, 4) else 1)
    seen = found.outcomes()["corrupted.fog.2"]
    assert seen.tolist() == [False, True, True, True]
    assert corruptions.passes(chosen) == 75


def test_pixels_of_files_are_read_in_order_and_scaled(tmp_path):
    part = examples(2, (3, 4, 5))
    write_files(tmp_path / "c", part, stored=3, shape=(4, 5, 3))
    pixels = np.arange(15 * 60, dtype=np.int64).reshape(15, 4, 5, 3) % 256
    np.save(tmp_path / "c" / "snow.npy", pixels.astype(np.uint8))
    found = dict(corruptions.from_files(tmp_path / "c", part))
    for severity in (1, 2, 3, 4, 5):
        for image, channel in itertools.product((0, 1), (0, 1, 2)):
            expected = pixels[3 * (severity - 1) + image, :, :, channel] / 255
            np.testing.assert_allclose(found["snow", severity][image, channel], expected, 1e-6)


def pickled(folder):
    np.save(folder / "snow.npy", np.array([{}], dtype=object), allow_pickle=True)


DAMAGES = {
    "missing": (lambda folder: (folder / "snow.npy").unlink(), "snow.npy: not a readable npy"),
    "pickled": (pickled, "snow.npy: expected an npy file with an array of numbers"),
    "text": (lambda f: (f / "snow.npy").write_text("no"), "snow.npy: expected an npy file"),
    "empty": (lambda f: (f / "snow.npy").write_text(""), "snow.npy: not a readable npy"),
    "floats": (
        lambda f: np.save(f / "snow.npy", np.zeros((30, 8, 8, 1))),
        "snow.npy: expected an npy file with an array of whole numbers",
    ),
    "shape": (
        lambda f: np.save(f / "snow.npy", np.zeros((30, 9, 8, 1), np.uint8)),
        "snow.npy: expected uint8 images of shape (30, 8, 8, 1), found uint8 of shape (30, 9, 8",
    ),
    "labels": (
        lambda f: np.save(f / "labels.npy", np.zeros(30, np.int64)),
        "labels.npy: expected the labels of the test images 5 times, in order",
    ),
    "few": (
        lambda f: np.save(f / "labels.npy", np.array([0, 1, 0] * 5)),
        "labels.npy: expected the labels of the test images 5 times, in order",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_do_not_fit_are_refused_in_one_line(damage, tmp_path):
    spoil, message = DAMAGES[damage]
    write_files(tmp_path / "c", examples())
    spoil(tmp_path / "c")
    with pytest.raises(UsageError) as caught:
        list(corruptions.from_files(tmp_path / "c", examples()))
    assert str(caught.value).startswith(f"{tmp_path / 'c'}/{message}")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a study


def test_off_by_default():
    off = Evaluation(n_examples=4, selections={"last": ["clean"]})
    assert corruptions.measure(Brightest(), examples(), off, "digits", CPU).rows() == []
    assert corruptions.passes(off) == 0


def test_images_that_are_misclassified_without_corruption_count_too():
    part = Part(torch.full((4, 1, 8, 8), 0.3), torch.ones(4, dtype=torch.int64))
    found = corruptions.measure(Brightest().eval(), part, settings(), "digits", CPU)
    assert {row["source"] for row in found.rows()} == {"generated corruptions"}
    correct = {(row["corruption"], row["severity"]): row["n_correct"] for row in found.rows()}
    assert correct["brightness", 1] == 0
    assert correct["brightness", 3] == 4  # 0.3 + 0.3 is above a half
    assert corruptions.passes(settings()) == len(correct) == 50


def test_a_folder_for_no_data_set_or_that_is_not_there_is_told(study_data, refused):
    study_data["evaluation"]["corruptions"] = {"folders": {"digit": "there"}}
    assert refused(study_data).endswith(
        "evaluation.corruptions.folders.digit: expected a data set of the study: digits; nearest "
        "match: 'digits'"
    )
    study_data["evaluation"]["corruptions"] = {"folders": {"digits": "there"}}
    assert 'evaluation.corruptions.folders.digits = "there": expected a folder' in refused(
        study_data
    )


def test_the_content_of_the_files_decides_the_evaluation(study_data, load_study, tmp_path):
    def plan(chosen):
        if chosen is not None:
            study_data["evaluation"]["corruptions"] = chosen
        study = load_study(study_data)
        return fingerprints.evaluation(study, study.cells()[0], "last").plan

    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "labels.npy", np.zeros(5, np.int64))
    plans = [plan(c) for c in (None, {}, {"folders": {"digits": str(tmp_path / "a")}})]
    assert len(set(plans)) == 3
    assert plan({"folders": {"digits": str(tmp_path / "b")}}) == plans[2]
    np.save(tmp_path / "b" / "labels.npy", np.ones(5, np.int64))
    assert plan({"folders": {"digits": str(tmp_path / "b")}}) != plans[2]


KEY = {
    "dataset": "digits",
    "arch": "small_cnn",
    "objective": "at",
    "method": "bcs",
    "sparsity": 0.9,
    "selection": "last",
}
CORRECT = {("fog", 1): 8, ("fog", 2): 6, ("pixelate", 1): 3, ("pixelate", 2): 2}


def material_of(seeds):
    """Ten images; the first ones are correct. Further rows of another selection do not count."""
    rows = [
        KEY | {"seed": seed, "corruption": c, "severity": s, "n_correct": n, "n_examples": 10}
        for seed in range(seeds)
        for (c, s), n in CORRECT.items()
    ]
    table = pd.DataFrame(rows).assign(source="x")
    other = table.assign(selection="best_val")
    return SimpleNamespace(
        tidy=SimpleNamespace(corruptions=pd.concat([table, other])),
        outcomes=SimpleNamespace(
            corrupted=lambda cell, selection, c, s: np.arange(10) < CORRECT[c, s] - cell.seed
        ),
        summary=pd.DataFrame([KEY]).assign(budget=""),
        primary="last",
        study=SimpleNamespace(label=lambda kind, name: name.upper()),
    )


def test_table_has_the_mean_over_corruptions_and_severities():
    material, group = material_of(1), SimpleNamespace(select=lambda table: table)
    [row] = study_tables.corruptions_table(material, group).to_dict("records")
    assert list(row)[2:] == ["Images", "Source", "Mean (%)", "Fog (%)", "Pixelate (%)"]
    assert (row["Method"], row["Images"], row["Source"]) == ("BCS", "10", "x")
    assert [row[f"{n} (%)"].split(" [")[0] for n in ("Mean", "Fog", "Pixelate")] == [
        "47.5",
        "70.0",
        "25.0",
    ]
    assert row["Fog (%)"].endswith("]")
    material.tidy.corruptions = material.tidy.corruptions[:0]
    assert study_tables.corruptions_table(material, group) is None


def test_interval_is_wilsons_for_all_images_and_wider_with_seeds_that_differ():
    group = SimpleNamespace(select=lambda table: table)
    one, two = (corrupted.accuracies(material_of(n), group) for n in (1, 2))
    assert one.corruption.tolist() == ["mean", "fog", "pixelate"]
    quantile = stats.t.isf(0.025, 9)  # of ten images
    for row in one.itertuples():
        centre = (row.accuracy + quantile**2 / 20) / (1 + quantile**2 / 10)
        half = quantile * (row.accuracy * (1 - row.accuracy) / 10 + quantile**2 / 400) ** 0.5
        half /= 1 + quantile**2 / 10
        assert (row.low, row.high) == pytest.approx((centre - half, centre + half))
    # The outcome of an image is its mean over severities, for each seed.
    severities = np.array([[8, 6], [7, 5]])
    outcomes = (np.arange(10) < severities[:, :, None]).mean(axis=1)
    low, high = accuracy_interval(outcomes)
    fog = two.set_index("corruption").loc["fog"]
    assert (fog.accuracy, fog.low, fog.high) == pytest.approx((0.65, low, high))
    assert fog.high - fog.low > (one.high - one.low)[1]


def test_an_evaluation_records_and_collects_corruptions(study_data, load_study, tmp_path):
    study_data["evaluation"] |= {"n_examples": 12, "corruptions": {}}
    study_data["evaluation"]["attacks"]["pgd"] = {"steps": 2, "restarts": 1}
    study_data["evaluation"]["sanity_checks"] = {"n_examples": 0}
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    model = models.build(cell.arch, study.archs[cell.arch], (1, 8, 8), 10)
    weights.save(layout.model(cell, "last"), model.state_dict())
    path = evaluate_cell(study, cell, "last", layout, device="cpu")
    record, flags = read_record(path), read_flags(layout.flags(cell, "last"))
    assert len(record.corruptions) == 50
    for row in record.corruptions:
        seen = flags[f"corrupted.{row['corruption']}.{row['severity']}"]
        assert (row["n_correct"], row["n_examples"]) == (int(seen.sum()), 12)
    assert {row.attack for row in record.rows} == {"clean", "pgd"}  # a corruption is no attack
    mean = sum(row["n_correct"] for row in record.corruptions) / 6  # in % of 600 images
    [line] = [line for line in summary(path).splitlines() if line.startswith("corruptions")]
    assert f"{mean:.2f} % (generated corruptions, mean over corruptions and sever" in line

    collect.collect(study, layout, layout.root)
    table = tidy.read(layout.root).corruptions
    assert table.n_correct.tolist() == [row["n_correct"] for row in record.corruptions]
    assert set(table.source) == {"generated corruptions"}

    material = make_material(study, layout, tidy.read(layout.root))
    found = corrupted.accuracies(material, tidy.groups(study)[0])
    assert len(found) == 11
    assert found.accuracy[0] == pytest.approx(mean / 100)
    assert "plots/corruptions.png" in figures.plots_of(study)
    with style.applied():
        figure = corruptions_plot.corruptions(material)
    [panel] = figure.axes
    [line] = [line for line in panel.lines if len(line.get_xdata()) == 11]
    assert line.get_ydata() == pytest.approx(100 * found.accuracy)
    [bars] = panel.collections
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(100 * found[["low", "high"]].to_numpy())
    assert "generated corruptions" in figure.caption[0]

    content = json.loads(path.read_text())
    content["corruptions"][7]["n_correct"] += 1
    del content["checksum"]
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"corruption shot_noise\.3: \d+ of 12") as no:
        collect.collect(study, layout, layout.root)
    assert "\n" not in str(no.value)
