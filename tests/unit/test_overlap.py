"""Mask overlap: computed by hand, by simulation, and from files."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robsparse.collection import overlap
from robsparse.networks import weights
from robsparse.study.cells import Layout

SIZES = (16, 40)


def packed(layers):
    return [np.packbits(layer) for layer in layers]


@st.composite
def masks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    return packed([rng.random(size) < draw(st.floats(0, 1)) for size in SIZES])


def jaccard(a, b):
    return overlap.overlaps([a, b])[0][0, 1]


def expected_jaccard(a, b):
    return overlap.overlaps([a, b])[1][0, 1]


def test_indices_equal_values_computed_by_hand():
    a = packed([np.arange(16) < 4, np.arange(40) < 2])
    b = packed([np.arange(16) < 8, np.arange(40) == 1])
    assert jaccard(a, b) == 5 / 10
    both = 4 * 8 / 16 + 2 * 1 / 40
    assert expected_jaccard(a, b) == pytest.approx(both / (15 - both))


@given(st.lists(masks(), min_size=2, max_size=5))
def test_indices_of_several_networks_are_those_of_each_pair_weight_by_weight(networks):
    measured, expected = overlap.overlaps(networks)
    whole = [[set(np.flatnonzero(np.unpackbits(bits))) for bits in mask] for mask in networks]
    for i, j in itertools.combinations(range(len(networks)), 2):
        both = sum(len(a & b) for a, b in zip(whole[i], whole[j], strict=True))
        either = sum(len(a | b) for a, b in zip(whole[i], whole[j], strict=True))
        assert measured[i, j] == (both / either if either else 1)
        counts = [(len(a), len(b)) for a, b in zip(whole[i], whole[j], strict=True)]
        chance = sum(a * b / n for (a, b), n in zip(counts, SIZES, strict=True))
        union = sum(a + b for a, b in counts) - chance
        assert expected[i, j] == (chance / union if union else 1)


def test_large_layers_are_counted_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    networks = [packed([rng.random(size) < 0.3 for size in (16, 800)]) for _ in range(3)]
    whole = overlap.overlaps(networks)
    monkeypatch.setattr(overlap, "_PART", 7)
    assert np.array_equal(whole, overlap.overlaps(networks))


@given(masks(), masks())
def test_symmetric_and_between_zero_and_one(a, b):
    for measure in (jaccard, expected_jaccard):
        assert measure(a, b) == measure(b, a)
        assert 0 <= measure(a, b) <= 1
    assert jaccard(a, a) == 1


def test_expected_index_is_that_of_random_masks():
    rng = np.random.default_rng(0)
    sizes, counts = (160, 400), ((40, 80), (100, 30))

    def random_mask(which):
        return packed([rng.permutation(n) < k[which] for n, k in zip(sizes, counts, strict=True)])

    found = [jaccard(random_mask(0), random_mask(1)) for _ in range(400)]
    assert np.mean(found) == pytest.approx(
        expected_jaccard(random_mask(0), random_mask(1)), abs=0.005
    )


def test_pairs_of_a_study(study_data, load_study, tmp_path):
    study_data["grid"] |= {"methods": ["bcs", "lwm"], "seeds": [0, 1]}
    study_data["evaluation"]["selections"] = {"best_val": ["clean"], "last": ["clean"]}
    study, layout = load_study(study_data), Layout(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for cell in study.cells():
        if (cell.method, cell.seed) != ("lwm", 1):  # not trained yet
            for selection in ("best_val", "last"):
                state = {
                    "a.weight": torch.randn(4, 10, generator=generator).relu(),
                    "b.weight": torch.randn(4, 2, 3, 3, generator=generator).relu(),
                    "b.bias": torch.ones(4),
                }
                weights.save(layout.model(cell, selection), state)
    rows = overlap.mask_overlaps(study, layout)
    found = {
        (r["method_a"], r["seed_a"], r["selection_a"], r["method_b"], r["seed_b"], r["selection_b"])
        for r in rows
    }
    assert len(rows) == len(found) == 9  # 3 networks: 3 with their own last, 3 pairs twice
    assert ("bcs", 0, "best_val", "bcs", 0, "last") in found
    assert not any("dense" in pair for pair in found)
    one = overlap.read_masks(layout.model(study.cells()[0], "last"))
    assert [len(bits) for bits in one] == [5, 9]
