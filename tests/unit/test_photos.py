"""The studies of docs/protocol.md say what the protocol says, and agree with each other."""

import os
import re
import subprocess

import pytest

from robsparse.study import fingerprints
from robsparse.study.cost import passes_per_epoch
from robsparse.study.loading import load

FOUR = ("lwm", "admm", "hydra", "bcs")
MORE = ("harp", "flyingbird", "rigl", "static_random")


@pytest.fixture(scope="module")
def studies(repository):
    names = ("photos", "photos_more", "photos_lr", "photos_scale")
    return {name: load(repository / "config" / f"{name}.yaml") for name in names}


def passes(study, cell):
    """Passes over each training image, with those of the network that the cell starts from."""
    planned, start = study.planned[cell], study.starting_cell(cell)
    epochs = sum(fit.epochs for fit in planned.stages.values())
    own = epochs * passes_per_epoch(cell.objective, planned.training)
    return own + (passes(study, start) if start else 0)


def test_four_methods_at_three_sparsities_with_three_seeds(studies):
    cells = studies["photos"].cells()
    found = {(c.method, c.sparsity, c.seed) for c in cells if c.sparsity}
    assert found == {(m, s, k) for m in FOUR for s in (0.9, 0.95, 0.99) for k in range(3)}
    assert {(c.dataset, c.arch, c.objective) for c in cells} == {
        ("cifar10_jpeg", "small_resnet", "at")
    }


@pytest.mark.parametrize("name", ["photos", "photos_more", "photos_lr"])
def test_every_sparse_network_costs_240_passes_and_its_dense_network_half(name, studies):
    study = studies[name]
    for cell in study.cells():
        expected = 240 if cell.sparsity or cell.method == "dense_full" else 120
        assert passes(study, cell) == expected, cell.key


def test_further_methods_leave_the_networks_of_the_four_as_they_are(studies):
    first, more = studies["photos"], studies["photos_more"]
    assert first.study == more.study  # one folder of results
    for cell in first.cells():
        one, other = (fingerprints.evaluation(s, cell, "best_val") for s in (first, more))
        assert one.settings == other.settings, cell.key
    added = {cell.method for cell in more.cells()} - {cell.method for cell in first.cells()}
    assert added == {*MORE, "dense_full"}


def test_search_of_rates_differs_only_in_images_seed_rates_and_validations(studies):
    """The same rates for every method, and no seed of the study."""
    search, study = studies["photos_lr"], studies["photos_more"]
    assert {cell.seed for cell in search.cells()}.isdisjoint(c.seed for c in study.cells())
    rates = {}
    for cell, planned in search.planned.items():
        method, fits = search.base("method", cell.method), planned.stages
        rates.setdefault((method, cell.sparsity), set()).add([*fits.values()][-1].lr)
        [same] = [c for c in study.cells() if (c.method, c.seed) == (method, 0)][:1]
        changed = {"validation": planned.training.validation.model_copy(update={"every": 1})}
        assert planned.training.model_copy(update=changed) == study.planned[same].training
        for name, fit in study.planned[same].stages.items():
            assert fits[name].model_copy(update={"lr": fit.lr}) == fit, cell.key
    assert set(map(frozenset, rates.values())) == {frozenset({0.03, 0.1, 0.3})}
    assert len(rates) == 1 + 3 * (len(FOUR) + len(MORE))


def test_other_settings_of_each_method_are_those_of_the_study(studies):
    """All hyperparameters except stages; periods in steps are a quarter, as the steps are."""
    search, study = studies["photos_lr"], studies["photos_more"]
    for name in search.methods:
        own = search.methods[name].model_dump(exclude={"label", "base", "starts_from"})
        theirs = study.methods[search.base("method", name)].model_dump(exclude={"label"})
        for key in own.keys() & theirs.keys():
            if isinstance(own[key], dict):
                continue
            scaled = search.base("method", name) in ("rigl", "flyingbird") and "every" in key
            quarter = theirs[key] / 4 if scaled else None
            assert own[key] == theirs[key] or abs(own[key] - quarter) < 1, (name, key)


def test_scale_study_has_both_widths_and_both_lengths_and_the_networks_of_the_study(studies):
    scale, study = studies["photos_scale"], studies["photos"]
    found = {
        (scale.archs[c.arch].width, scale.base("method", c.method), passes(scale, c))
        for c in scale.cells()
        if c.method.removesuffix("_x4") in ("hydra", "bcs")
    }
    assert found == {
        (width, method, total)
        for width in (16, 32)
        for method in ("hydra", "bcs")
        for total in (240, 960)
    }
    for cell in scale.cells():
        if cell in study.planned:  # rates of the study at 99 %, once they are chosen
            assert scale.planned[cell] == study.planned[cell], cell.key


def test_script_for_a_gpu_names_each_network_once_the_dense_one_first(repository):
    """Its commands, as it prints them without running them: training, then attacks."""
    done = subprocess.run(
        ["bash", repository / "benchmarks" / "gpu.sh", "40"],
        env=os.environ | {"DRY": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    study = load(repository / "config" / "cifar10_gpu.yaml")
    named = re.findall(r"robsparse (train|evaluate) (\S+) --cell (\S+)", done.stdout)
    keys = [cell.key for cell in study.cells()]
    for command in ("train", "evaluate"):
        cells = [cell for word, _, cell in named if word == command]
        assert sorted(cells) == sorted(keys)
        assert "/dense/" in cells[0]
    assert {config for _, config, _ in named} == {"config/cifar10_gpu.yaml"}
    limits = [int(seconds) for seconds in re.findall(r"at most (\d+) s", done.stdout)]
    assert max(limits) <= 40 * 60
