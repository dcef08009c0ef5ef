"""The comparison of two runs: what agrees, what differs, what cannot be compared."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from robsparse.base.errors import UsageError
from robsparse.cli.main import main
from robsparse.figures.data import agreement, statistics
from robsparse.records.columns import OUTCOME_COLUMNS
from robsparse.records.rows import KEY

IMAGES = 200
REFERENCE = "results/reference/quick"


class Made:
    """A run with outcomes: methods x seeds x attacks, written as `robsparse collect` does."""

    def __init__(self, folder, outcomes, **changes):
        self.folder, self.outcomes, self.changes = folder, outcomes, changes

    def write(self, with_outcomes=True):
        self.folder.mkdir(parents=True, exist_ok=True)
        rows, packed = [], []
        for (method, seed, attack), seen in self.outcomes.items():
            key = ("digits", "small_cnn", method, "at", 0.9, seed, "last", attack, "all")
            row = dict(zip(KEY, key, strict=True)) | {
                "accuracy": seen.mean(),
                "n_correct": int(seen.sum()),
                "n_examples": len(seen),
                "code_version": "1",
                "data_checksum": "d",
                **{"norm": "Linf", "eps": 0.1, "steps": 10, "restarts": 1, "version": None},
            }
            rows.append(row | self.changes)
            values = (attack, len(seen), np.packbits(seen).tobytes())
            packed.append(dict(zip([*KEY[:7], *OUTCOME_COLUMNS], (*key[:7], *values), strict=True)))
        pd.DataFrame(rows).to_csv(self.folder / "results.csv", index=False)
        if with_outcomes:
            pd.DataFrame(packed).to_parquet(self.folder / "outcomes.parquet")
        return self.folder


def outcomes(rng, noise, shift=0.0, methods=("lwm", "bcs", "rigl", "set"), seeds=(0, 1, 2)):
    """A run of a study. Images are as difficult in every run; a seed moves its whole network."""
    difficulty = np.random.default_rng(9).normal(size=IMAGES)
    found = {}
    for place, method in enumerate(methods):
        for seed in seeds:
            level = 0.5 + rng.normal(0, noise) - (shift if method == "bcs" else 0)
            strength = level + difficulty + rng.normal(0, 0.3, IMAGES) - 0.1 * place
            for attack, power in (("clean", 0.0), ("pgd", 0.5)):
                found[method, seed, attack] = strength > power
    return found


@pytest.fixture
def run(tmp_path):
    def make(name, seed, noise=0.05, shift=0.0, write=True, **options):
        with_outcomes = options.pop("with_outcomes", True)
        changes = options.pop("changes", {})
        rng = np.random.default_rng(seed)
        made = Made(tmp_path / name, outcomes(rng, noise, shift, **options), **changes)
        return made.write(with_outcomes) if write else made

    return make


def test_two_runs_of_the_same_networks_agree_and_the_exit_code_says_so(run, capsys):
    assert main(["compare", str(run("a", 1)), str(run("b", 2))]) == 0
    text = capsys.readouterr().out
    assert text.endswith("reproduced: 4 of 4 rows within intervals\n")
    assert text.count("agrees") == 4
    assert "8 intervals that hold together at 95%" in text


def test_a_method_that_lost_accuracy_differs_and_no_other_row(run, capsys):
    a, b = run("a", 1), run("b", 2, shift=0.6)
    assert main(["compare", str(a), str(b)]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert line.startswith("digits/small_cnn/at bcs 0.9")
    found = agreement.agreement(a, b)
    assert {line[3] for line in found.apart} == {"bcs"}
    assert "not reproduced: 3 of 4 rows within intervals" in str(found)


def test_equal_bits_are_named_as_equal(run):
    found = agreement.agreement(run("a", 1), run("b", 1))
    assert all(one.equal for one in found.compared)
    assert "8 of 8 comparisons have the same outcome for every image" in str(found)
    assert not any(one.equal for one in agreement.agreement(run("a", 1), run("c", 2)).compared)


def test_every_attack_is_printed_if_asked_for(run):
    found = agreement.agreement(run("a", 1), run("b", 2))
    assert found.text(every=True).count("  clean  ") == found.text(every=True).count("  pgd ") == 4


def test_the_interval_is_that_of_the_paired_model_with_the_pooled_variance_of_seeds(run):
    """An independent computation for one row: with the same seeds and images side by side."""
    a, b = run("a", 1, write=False), run("b", 2, write=False)
    found = agreement.agreement(a.write(), b.write())
    [one] = [c for c in found.compared if (c.line[3], c.attack) == ("lwm", "pgd")]
    by_seed = {}
    for method in ("lwm", "bcs", "rigl", "set"):
        pairs = [(a.outcomes[method, s, "pgd"], b.outcomes[method, s, "pgd"]) for s in range(3)]
        by_seed[method] = np.var([x.mean() - y.mean() for x, y in pairs], ddof=1)
    mean = np.mean(list(by_seed.values()))
    assert one.difference.of_seeds == pytest.approx(max(mean, by_seed["lwm"]) / 3)
    assert one.difference.freedom == 8
    plain = statistics.difference(
        *(np.stack([r.outcomes["lwm", s, "pgd"] for s in range(3)]) for r in (a, b))
    )
    assert one.difference.mean == plain.mean
    assert one.difference.of_images == plain.of_images
    own = dataclasses.replace(plain, of_seeds=one.difference.of_seeds, freedom=8)
    assert one.difference.interval(found.level) == own.interval(1 - 0.05 / 8)


def rate_of_false_alarms(noise, studies=120):
    """Share of pairs of runs of equal networks in which a row differs."""
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(studies):
        first, second = outcomes(rng, noise, seeds=(0, 1)), outcomes(rng, noise, seeds=(0, 1))
        compared = []
        for method, attack in dict.fromkeys((m, a) for m, _, a in first):
            pair = [np.stack([r[method, s, attack] for s in (0, 1)]) for r in (first, second)]
            apart = statistics.difference(*pair)
            compared.append(agreement.Compared((method,), attack, 0.0, 0.0, apart, False))
        level = 1 - 0.05 / len(compared)
        alarms += not all(one.within(level) for one in agreement._pooled(compared))
    return alarms / studies


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_equal_networks_with_two_seeds_seldom_differ(noise):
    assert rate_of_false_alarms(noise) <= 0.08


def test_without_outcomes_intervals_are_wider_and_the_text_says_so(run):
    paired = agreement.agreement(run("a", 1), run("b", 2))
    bare = agreement.agreement(run("a", 1), run("c", 2, with_outcomes=False))
    assert "c: no outcomes.parquet" in str(bare)
    assert "no outcomes.parquet" not in str(paired)
    for one, other in zip(paired.compared, bare.compared, strict=True):
        low, high = one.difference.interval(paired.level)
        wide_low, wide_high = other.difference.interval(paired.level)
        assert wide_high - wide_low > high - low
        assert one.difference.mean == pytest.approx(other.difference.mean)


def test_one_seed_has_intervals_over_images_only(run):
    found = agreement.agreement(run("a", 1, seeds=(0,)), run("b", 2, seeds=(0,)))
    assert "rows with one seed: the interval is over images only" in str(found)
    assert found.holds


NOT_COMPARABLE = {
    "seeds": ({"seeds": (0, 1, 3)}, "other seeds: [0, 1, 2] and [0, 1, 3]"),
    "eps": ({"changes": {"eps": 0.2}}, "other eps: 0.1 and 0.2"),
    "images": ({"changes": {"data_checksum": "x"}}, "other data_checksum: d and x"),
    "steps": ({"changes": {"steps": 20}}, "other steps: 10 and 20"),
}


@pytest.mark.parametrize("what", NOT_COMPARABLE)
def test_rows_of_other_settings_are_not_compared(what, run):
    changes, reason = NOT_COMPARABLE[what]
    found = agreement.agreement(run("a", 1), run("b", 1, **changes))
    assert not found.holds
    assert str(found).count(reason) == 4


def test_a_row_of_one_run_only_is_not_reproduced(run):
    found = agreement.agreement(run("a", 1), run("b", 1, methods=("lwm", "bcs", "rigl")))
    assert not found.holds
    assert "digits/small_cnn/at set 0.9: not compared: not in " in str(found)
    assert "not reproduced: 3 of 4 rows within intervals" in str(found)


def test_bad_input_is_one_line(run, tmp_path, capsys):
    good = run("a", 1)
    assert main(["compare", str(good), str(tmp_path / "none")]) == 2
    assert "none/results.csv: no such file" in capsys.readouterr().err
    assert main(["compare", str(good), str(good), "--selection", "best_val"]) == 2
    assert "expected one of: last" in capsys.readouterr().err
    (good / "outcomes.parquet").write_bytes(b"no table")
    assert main(["compare", str(good), str(good)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "outcomes.parquet: damaged" in line


def test_outcomes_that_contradict_the_results_are_refused(run):
    good, other = run("a", 1), run("b", 2)
    (other / "outcomes.parquet").write_bytes((good / "outcomes.parquet").read_bytes())
    with pytest.raises(UsageError, match=r"outcomes\.parquet: \d+ correct images of"):
        agreement.agreement(good, other)


def test_the_committed_reference_is_reproduced_by_itself_in_all_13_rows(repository):
    folder = repository / REFERENCE
    found = agreement.agreement(folder, folder)
    assert found.a.outcomes
    assert str(found).endswith("reproduced: 13 of 13 rows within intervals")
    assert all(one.equal for one in found.compared)


def test_reproduce_ends_with_the_comparison(repository):
    recipe = (repository / "Makefile").read_text().split("reproduce: $(INSTALLED)\n")[1]
    lines = recipe.split("\n\n")[0].splitlines()
    assert lines[-1] == f"\trobsparse compare results/quick {REFERENCE}"
