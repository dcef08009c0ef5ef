"""Names of cells and files, and seeds that are derived from names."""

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robsparse.base.errors import UsageError
from robsparse.study.cells import LONGEST_NAME, Cell, Layout, derive_seed, is_name

WORDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", fullmatch=True)
CELL = Cell("digits", "small_cnn", "bcs", "at", 0.95, 0)


def test_key_has_the_documented_form():
    assert CELL.key == "digits/small_cnn/bcs/at/s0.9500/seed0"


@given(st.lists(WORDS, min_size=4, max_size=4), st.integers(0, 9999), st.integers(0, 2**31 - 1))
def test_key_is_parsed_to_the_same_cell(words, sparsity, seed):
    cell = Cell(*words, sparsity / 10_000, seed)
    assert Cell.parse(cell.key) == cell
    assert Cell.parse(f"/{cell.key}/") == cell


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_cells_of_two_sparsities_never_share_a_key(one, other):
    keys = {Cell("d", "a", "m", "at", s / 10_000, 0).key for s in (one, other)}
    assert len(keys) == len({one, other})


def test_a_cell_rounds_its_sparsity():
    """1 - 0.1 * 0.5 and 0.95 give the same cell, key and seed."""
    cell = Cell("digits", "small_cnn", "bcs", "at", 1 - 0.05000001, 0)
    assert cell == CELL
    assert cell.sparsity == 0.95
    assert cell.sparsity_text == "0.9500"
    assert cell.key == CELL.key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "digits/small_cnn/bcs/at/s0.9500",
        "digits/small_cnn/bcs/at/s0.95/seed0",
        "digits/small_cnn/bcs/at/s1.0000/seed0",
        "digits/small_cnn/bcs/at/s0.9500/seed-1",
        "digits/small_cnn/bcs/at/s0.9500/seed0/extra",
        "digits/small_cnn/bcs/at/s0.9500/seed0\n",
        "digits//bcs/at/s0.9500/seed0",
        "digits/small_cnn/bcs/at/0.9500/0",
    ],
)
def test_error_about_an_invalid_key_is_one_line_with_an_example(key):
    with pytest.raises(UsageError, match=r"like digits/small_cnn/bcs/at/s0\.9500/seed0"):
        Cell.parse(key)


def test_all_files_of_a_study_have_different_paths():
    layout = Layout(Path("results/quick"))
    cells = [CELL, Cell("digits", "small_cnn", "bcs", "at", 0.95, 1)]
    paths = [
        path
        for cell in cells
        for path in (
            layout.training(cell),
            layout.steps(cell),
            layout.resume(cell),
            *(layout.model(cell, s) for s in ("best_val", "last")),
            *(layout.evaluation(cell, s) for s in ("best_val", "last")),
            *(layout.flags(cell, s) for s in ("best_val", "last")),
        )
    ]
    assert len(set(paths)) == len(paths) == 18
    assert layout.model(CELL, "last") == Path(
        "results/quick/models/digits/small_cnn/bcs/at/s0.9500/seed0/last.safetensors"
    )


def test_resume_folder_is_not_a_parent_of_an_output():
    layout = Layout(Path("r"))
    outputs = (layout.model(CELL, "last"), layout.training(CELL), layout.evaluation(CELL, "last"))
    assert not any(layout.resume(CELL) in output.parents for output in outputs)


def test_derived_seed_is_a_known_value():
    """First 8 bytes of SHA-256 of the axes, without the sign bit. Published results need it."""
    digest = hashlib.sha256(b"init\x1fsmall_cnn\x1f0").digest()
    expected = int(digest[:8].hex(), 16) // 2
    assert derive_seed("init", "small_cnn", 0) == expected == 4381467281129088887


@given(st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=4))
def test_derived_seed_fits_a_generator(axes):
    assert 0 <= derive_seed(*axes) < 2**63


def test_derived_seed_depends_on_every_axis_and_on_their_order():
    calls = [
        ("init", "small_cnn", 0),
        ("init", "small_cnn", 1),
        ("init", "small_cnn", 10),
        ("init", "small_cnn1", 0),
        ("order", "small_cnn", 0),
        ("small_cnn", "init", 0),
        ("initsmall_cnn", 0),
        ("init", "small_cnn0"),
        ("init", "small_cnn", "", 0),
    ]
    assert len({derive_seed(*axes) for axes in calls}) == len(calls)


def test_files_of_a_study_have_the_documented_paths():
    layout, key = Layout(Path("r")), "digits/small_cnn/bcs/at/s0.9500/seed0"
    assert layout.training(CELL) == Path(f"r/models/{key}/training.json")
    assert layout.steps(CELL) == Path(f"r/models/{key}/steps.parquet")
    assert layout.lifetimes(CELL) == Path(f"r/models/{key}/lifetimes.parquet")
    assert layout.resume(CELL) == Path(f"r/resume/{key}")
    assert layout.cache(CELL, "last") == Path(f"r/resume/evaluations/{key}/last")
    assert layout.failed(CELL) == Path(f"r/failed/{key}.txt")
    assert layout.evaluation(CELL, "last") == Path(f"r/evaluations/{key}/last.json")
    assert layout.flags(CELL, "last") == Path(f"r/evaluations/{key}/last.flags.npz")
    assert (layout.tables(False), layout.tables(True)) == (Path("r"), Path("r/partial"))


@pytest.mark.parametrize("name", ["bcs\n", "b cs", "b;cs", "..", "", "-b", "b/c", "b" * 65])
def test_a_cell_refuses_names_that_are_not_safe_in_a_path(name):
    with pytest.raises(UsageError, match="expected a name of at most 64 letters"):
        Cell("digits", "small_cnn", name, "at", 0.9, 0)
    with pytest.raises(UsageError, match="expected dataset/arch/method"):
        Cell.parse(f"digits/small_cnn/{name}/at/s0.9000/seed0\n")


def test_the_longest_valid_name_is_accepted():
    assert is_name("a" * LONGEST_NAME)
    assert not is_name("a" * (LONGEST_NAME + 1))
