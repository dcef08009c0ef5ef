"""The log of connections against a slow implementation with one entry for each connection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robsparse.sparsity import history
from robsparse.sparsity.history import ConnectionLog, empty_lifetimes, empty_steps

SIZES = {"first": 7, "second": 12}


def random_masks(generator):
    return {name: torch.rand(size, generator=generator) < 0.5 for name, size in SIZES.items()}


def positions(mask):
    return mask.nonzero().squeeze(1)


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 12),
    every=st.sampled_from([1, 2, 5]),
    at_once=st.sampled_from([1, 3, 256]),
)
def test_log_equals_a_slow_implementation(seed, count, every, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "STEPS_AT_ONCE", at_once)
        compare_with_a_slow_implementation(seed, count, every)


def compare_with_a_slow_implementation(seed, count, every):
    generator = torch.Generator().manual_seed(seed)
    active = random_masks(generator)
    log = ConnectionLog(active, every)
    active_since = {n: dict.fromkeys(positions(mask).tolist(), 0) for n, mask in active.items()}
    pruned_ages, rows = [], [{n: (0, 0, len(active_since[n]), 0.0) for n in SIZES}]
    window = {n: [0, 0] for n in SIZES}
    for step in range(1, count + 1):
        pruned_positions, regrown_positions = [], []
        for name, size in SIZES.items():
            pruned = active[name] & (torch.rand(size, generator=generator) < 0.4)
            left = active[name] & ~pruned
            new = ~left & (torch.rand(size, generator=generator) < 0.3)
            pruned_positions.append(positions(pruned))
            regrown_positions.append(positions(new))
            active[name] = left | new
            for place in positions(pruned).tolist():
                start = active_since[name].pop(place)
                pruned_ages += [step - start] if start else []
            active_since[name] |= dict.fromkeys(positions(new).tolist(), step)
            window[name][0] += int(pruned.sum())
            window[name][1] += int(new.sum())
        log.record_by_layer(pruned_positions, regrown_positions)
        if seed % 3 == 0 and step == count // 2:  # a third of the time after an interruption
            log = ConnectionLog.from_state(log.state(), torch.device("cpu"))
        if step % every == 0:
            rows.append(
                {
                    n: (*window[n], len(b), step - sum(b.values()) / len(b) if b else None)
                    for n, b in active_since.items()
                }
            )
            window = {n: [0, 0] for n in SIZES}
    if seed % 2:  # half of the time after an interruption
        log = ConnectionLog.from_state(log.state(), torch.device("cpu"))
    table = log.steps().to_pandas()
    assert len(table) == len(rows) * len(SIZES)
    for i, expected in enumerate(rows):
        for name, (pruned, regrown, active, age) in expected.items():
            found = table[(table.step == i * every) & (table.layer == name)].iloc[0]
            assert (found.pruned, found.regrown, found.active) == (pruned, regrown, active)
            assert age is None or abs(found.age - age) < 1e-9
    ages = [step - start for b in active_since.values() for start in b.values() if start]
    lifetimes = log.lifetimes().to_pandas()
    assert lifetimes.pruned.sum() == len(pruned_ages)
    assert lifetimes.active.sum() == len(ages)
    for row in lifetimes.itertuples():
        assert (row.pruned, row.active) == (pruned_ages.count(row.age), ages.count(row.age))


def test_tables_of_a_method_that_never_rewires_have_the_same_columns():
    log = ConnectionLog({"only": torch.ones(3, dtype=torch.bool)})
    log.record(torch.tensor([0]), torch.tensor([0]))
    assert log.steps().column_names == empty_steps().column_names
    assert log.lifetimes().column_names == empty_lifetimes().column_names
