"""Every registered method has the properties that comparisons need."""

import ast
import contextlib
import copy
import json
import math
from collections import Counter
from typing import get_args

import pytest
import torch
import yaml

from robsparse.base import registry
from robsparse.base.counts import keep_count
from robsparse.compute import randomness
from robsparse.datasets import load as load_dataset
from robsparse.schema.training import Objective
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.training import loop, resuming
from robsparse.training import session as training_session
from robsparse.training.checkpoints import Interrupted
from robsparse.training.session import prepare_session
from robsparse.training.validation import validate

METHODS = registry.names("method")
SCRATCH = [
    name for name in METHODS if not registry.entry("method", name).literals.get("STARTS_FROM")
]
SELECTIONS = ("best_val", "last")
EXACT = ("bcs",)
PATTERNED = [
    name for name in METHODS if "pattern" in registry.entry("method", name).params.model_fields
]
# A method, and its settings in the study. A method with N:M sparsity has two such settings.
SETTINGS = [
    *(pytest.param(name, {}, id=name) for name in METHODS),
    *(pytest.param(name, {"pattern": "1:4"}, id=f"{name}-1:4") for name in PATTERNED),
]
PERIODIC = [
    name
    for name in METHODS
    if any(key.endswith("_every") for key in registry.entry("method", name).params.model_fields)
]
CPU = torch.device("cpu")


def is_dense(method):
    return registry.entry("method", method).literals.get("DENSE", False)


def adapts_sparsity(method):
    return registry.entry("method", method).literals.get("ADAPTS_SPARSITY", False)


def record_of(case, layout):
    return json.loads(layout.training(case.cell).read_text())


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("method", METHODS)
def test_file_has_a_label_and_names_its_source(method):
    entry = registry.entry("method", method)
    assert entry.literals["LABEL"].strip()
    if not is_dense(method):
        assert "Source:" in ast.get_docstring(ast.parse(entry.path.read_text()))


@pytest.mark.parametrize("method", METHODS)
def test_starting_method_is_registered_and_dense(method):
    start = registry.entry("method", method).literals.get("STARTS_FROM")
    assert start is None or is_dense(start)


@pytest.mark.parametrize("method", METHODS)
def test_params_read_from_the_text_are_those_of_the_module(method):
    imported = registry.load("method", method).Params
    assert registry.entry("method", method).params.model_json_schema() == (
        imported.model_json_schema()
    )


@pytest.mark.parametrize("method", METHODS)
def test_params_survive_yaml(method, case):
    for params in (
        registry.entry("method", method).params(),
        case(method).study.methods[method],
    ):
        text = yaml.safe_dump(params.model_dump(mode="json"))
        assert type(params).model_validate(yaml.safe_load(text)) == params


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("method", METHODS)
def test_export_has_the_requested_number_of_nonzero_weights(method, sparsity, selection, trained):
    case, layout = trained(method, sparsity=sparsity)
    model = case.network(layout, selection)
    asked = keep_count(weight_count(model), case.cell.sparsity)
    slack = 0 if method in EXACT or is_dense(method) else len(prunable(model))
    if adapts_sparsity(method):
        record = record_of(case, layout)
        active = {point["epoch"]: point["active_weights"] for point in record["curve"]}
        asked, slack = active[record["selected"][selection]["epoch"]], 0
    assert abs(nonzero_count(model) - asked) <= slack


@pytest.mark.parametrize("method", [name for name in METHODS if adapts_sparsity(name)])
def test_a_method_that_adapts_its_sparsity_does_so(method, trained):
    """Otherwise, the tests of resuming would not see it."""
    case, layout = trained(method)
    active = [point["active_weights"] for point in record_of(case, layout)["curve"]]
    first = keep_count(weight_count(case.network(layout, "last")), case.cell.sparsity)
    assert active[0] == first
    assert active[-1] != first


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", 0.5), ("1:4", 0.9)])
@pytest.mark.parametrize("method", PATTERNED)
def test_export_has_the_pattern_and_the_number_of_weights_of_the_sparsity(
    method, pattern, sparsity, selection, trained
):
    case, layout = trained(method, sparsity=sparsity, pattern=pattern)
    most, size = map(int, pattern.split(":"))
    exported, tight = case.network(layout, selection), 0
    for module in prunable(exported).values():
        kept = module.weight.detach() != 0
        for first in range(0, kept.shape[1], size):
            counts = kept[:, first : first + size].sum(1)
            assert counts.max() <= most
            tight += int((counts == most).sum())
    assert tight > 0
    free, free_layout = trained(method, sparsity=sparsity)
    assert nonzero_count(exported) == nonzero_count(free.network(free_layout, selection))


@pytest.mark.parametrize("method", PERIODIC)
def test_periods_longer_than_the_training_still_end_at_the_requested_sparsity(method, trained):
    """A method that prunes only every n steps must also prune in a training of fewer steps."""
    case, layout = trained(method, default_periods=True)
    assert case.study.methods[method] != trained(method)[0].study.methods[method]
    for selection in SELECTIONS:
        model = case.network(layout, selection)
        asked = keep_count(weight_count(model), case.cell.sparsity)
        assert abs(nonzero_count(model) - asked) <= len(prunable(model))
        assert all(module.weight.count_nonzero() for module in prunable(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_no_layer_of_the_export_is_empty(method, trained):
    case, layout = trained(method)
    for selection in SELECTIONS:
        layers = prunable(case.network(layout, selection))
        assert all(module.weight.count_nonzero() for module in layers.values())


@pytest.mark.parametrize("objective", ["at", "natural", "trades"])
@pytest.mark.parametrize("method", METHODS)
def test_every_objective_trains_every_layer_by_more_than_weight_decay(method, objective, trained):
    case, layout = trained(method, objective=objective)
    masked = case.study.starting_cell(case.cell) is None
    before = weights_before_training(case, layout, masked=masked)
    weights_move = registry.entry("method", method).literals.get("TRAINS_WEIGHTS", True)
    exchanged = 0
    for name, module in prunable(case.network(layout, "last")).items():
        kept = (before[name] != 0) & (module.weight != 0)
        if not weights_move:  # only the mask changes
            assert torch.equal(module.weight[kept], before[name][kept]), name
            exchanged += int((kept != (before[name] != 0)).sum())
            continue
        ratio = module.weight[kept] / before[name][kept]
        assert ratio.std() > 1e-3, name
    assert weights_move or exchanged > 0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_export_has_the_accuracy_of_its_record(method, selection, trained):
    case, layout = trained(method)
    record = record_of(case, layout)
    selected = record["selected"][selection]
    point = next(p for p in record["curve"] if p["epoch"] == selected["epoch"])
    session = prepare_session(case.study, case.cell, layout, CPU)
    found = validate(
        case.network(layout, selection),
        load_dataset("digits", case.study.datasets["digits"]).validation,
        session.attacker,
        case.study.training.validation.steps,
    )
    assert found["val_robust"] == selected["val_robust"] == point["val_robust"]
    assert found["val_clean"] == point["val_clean"]


@pytest.mark.parametrize("method", METHODS)
def test_best_val_is_the_first_of_the_best_epochs_at_the_target_sparsity(method, trained):
    case, layout = trained(method)
    record = record_of(case, layout)
    nonzero = nonzero_count(case.network(layout, "best_val"))
    best = record["selected"]["best_val"]
    own = record["curve"][-case.steps // case.batches :]
    candidates = [point for point in own if point["active_weights"] == nonzero]
    if adapts_sparsity(method) or not registry.entry("method", method).literals.get(
        "TRAINS_WEIGHTS", True
    ):
        candidates = own  # any epoch can be selected
    first = max(candidates, key=lambda point: point["val_robust"])  # the first of equal ones
    assert (best["epoch"], best["val_robust"]) == (first["epoch"], first["val_robust"])


@pytest.mark.parametrize("method", METHODS)
def test_curve_has_one_point_for_each_epoch_and_the_cost_counts_them(method, trained):
    case, layout = trained(method)
    record = record_of(case, layout)
    epochs = case.steps // case.batches
    crafting = case.study.training.crafting.steps
    before = case.study.starting_cell(case.cell)
    if before is not None:
        epochs += trained(before.method)[0].steps // case.batches
    assert [point["epoch"] for point in record["curve"]] == list(range(1, epochs + 1))
    assert record["cost"]["epochs"] == epochs
    passes = epochs * case.batches * (crafting + 1)
    assert record["cost"]["forward_passes"] == record["cost"]["backward_passes"] == passes


@pytest.mark.parametrize("method", METHODS)
def test_peak_active_weights_are_those_of_the_training(method, trained):
    case, layout = trained(method)
    model = case.network(layout, "last")
    peak, total = record_of(case, layout)["cost"]["peak_active_weights"], weight_count(model)
    if case.study.starting_cell(case.cell) or is_dense(method):
        assert peak == total
    elif method in EXACT:
        assert peak == keep_count(total, case.cell.sparsity)
    else:
        assert nonzero_count(model) <= peak <= total


@pytest.mark.parametrize("method", METHODS)
def test_training_state_has_weights_gradients_and_velocities(method, trained):
    case, layout = trained(method)
    weights = sum(p.nbytes for p in case.network(layout, "last").parameters())
    assert record_of(case, layout)["cost"]["training_state_bytes"] >= 3 * weights


@pytest.mark.parametrize("objective", ["natural", "trades"])
@pytest.mark.parametrize("method", METHODS)
def test_every_objective_ends_at_the_same_sparsity(method, objective, trained):
    case, layout = trained(method, objective=objective)
    reference, reference_layout = trained(method)
    if adapts_sparsity(method):
        pytest.skip("its sparsity depends on the course of training")
    assert nonzero_count(case.network(layout, "last")) == nonzero_count(
        reference.network(reference_layout, "last")
    )


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_same_seed_gives_the_same_bits(method, settings, trained, prepared):
    case, layout = prepared(method, **settings)
    assert case.results(case.train(layout)) == case.results(trained(method, **settings)[1])


@pytest.mark.parametrize("method", METHODS)
def test_another_seed_gives_other_weights(method, trained):
    one, two = trained(method), trained(method, seed=1)
    assert one[0].results(one[1])["last"] != two[0].results(two[1])["last"]


def seen(stage, run):
    """Return all values that a hook may read, as numbers and digests."""

    def digest(value):
        if isinstance(value, dict):
            return {str(key): digest(own) for key, own in value.items()}
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return {
        "place": (run.epoch, run.step, run.steps, run.lr, run.lr_factor),
        "optimizer": hasattr(run, "optimizer"),
        "connections": run.connections and run.connections.step,
        "curve": copy.deepcopy(run.curve),
        "model": digest(run.model.state_dict()),
        "stage": digest(stage.state()),
        "random": (digest({"own": run.generator.get_state()}), digest(randomness.state(CPU))),
    }


@pytest.fixture
def hooks_seen(monkeypatch):
    """hooks_seen() -> the values that each further hook call sees, by stage, hook and order.

    A call that a resumed run repeats must see what it saw before.
    """
    calls, ordinary = {}, training_session.make_stages

    def watched(index, stage, name, hook):
        def call(run):
            key = (index, name, run.epoch, run.step)
            assert calls.setdefault(key, now := seen(stage, run)) == now, key
            return hook(run)

        return call

    def make_stages(*given):
        made = ordinary(*given)
        for index, stage in enumerate(made):
            for name in ("before_fit", "before_epoch", "before_step", "after_step", "finalize"):
                setattr(stage, name, watched(index, stage, name, getattr(stage, name)))
        return made

    def begin():
        calls.clear()
        monkeypatch.setattr(training_session, "make_stages", make_stages)
        return calls

    return begin


@pytest.mark.parametrize(("method", "settings"), SETTINGS)
def test_a_run_stopped_and_killed_at_every_step_equals_an_uninterrupted_one(  # noqa: PLR0917
    method, settings, trained, prepared, hooks_seen, monkeypatch
):
    """The run is stopped after a step, then killed before the next step, and so on.

    Before a kill, the checkpoint at the end of an epoch may be saved. All hooks see the same values
    as in an uninterrupted run, and the results are the same.
    """
    case, layout = prepared(method, **settings)
    calls = hooks_seen()
    case.train(layout)
    whole = dict(calls)
    layout.training(case.cell).unlink()
    layout.model(case.cell, "last").unlink()
    ordinary = loop.compute_gradients

    def die(*_):
        raise MemoryError

    monkeypatch.setattr(resuming, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)
    stops = 0
    while not layout.training(case.cell).exists():
        assert not layout.model(case.cell, "last").exists()
        monkeypatch.setattr(loop, "compute_gradients", ordinary)
        with contextlib.suppress(Interrupted):
            case.train(layout, max_steps=1)
            stops -= 1  # a stopped run does not reach this line
        stops += 1
        monkeypatch.setattr(loop, "compute_gradients", die)
        with contextlib.suppress(MemoryError):
            case.train(layout)
    assert stops == case.steps
    assert list(calls) == list(whole)
    assert case.results(layout) == case.results(trained(method, **settings)[1])


def test_every_hook_is_recorded(hooks_seen, prepared):
    """Otherwise, the comparison above would compare nothing."""
    case, layout = prepared("bcs")
    calls = hooks_seen()
    case.train(layout)
    names = Counter(name for _, name, *_ in calls)
    assert names == {
        "before_fit": 1,
        "before_epoch": 2,
        "before_step": case.steps,
        "after_step": case.steps,
        "finalize": 1,
    }
    places = [call["place"] for (_, name, *_), call in calls.items() if name == "before_step"]
    assert [place[:3] for place in places] == [
        (step // case.batches, step, case.steps) for step in range(case.steps)
    ]
    starts = [call["place"] for (_, name, *_), call in calls.items() if name == "before_epoch"]
    assert starts == [places[0], places[case.batches]]
    drops = [0.1 ** ((2 * step >= case.steps) + (4 * step >= 3 * case.steps)) for step in range(10)]
    assert [place[4] for place in places] == pytest.approx(drops)
    assert [place[3] for place in places] == pytest.approx([0.1 * drop for drop in drops])


@pytest.mark.parametrize(
    "damage",
    [lambda good: b"", lambda good: b"not a checkpoint", lambda good: good[: len(good) // 2]],
    ids=["empty", "garbage", "truncated"],
)
@pytest.mark.parametrize("keep_previous", [True, False], ids=["previous kept", "none kept"])
def test_damaged_checkpoint_never_changes_the_result(damage, keep_previous, trained, prepared):
    case, layout = prepared("dense")
    for _ in range(2):
        with pytest.raises(Interrupted):
            case.train(layout, max_steps=3)
    state = layout.resume(case.cell) / "state.pt"
    state.write_bytes(damage(state.read_bytes()))
    if not keep_previous:
        state.with_name("state.previous.pt").unlink()
    assert case.results(case.train(layout)) == case.results(trained("dense")[1])


@pytest.mark.parametrize("method", METHODS)
def test_finished_run_has_no_resume_state(method, trained):
    case, layout = trained(method)
    assert {path.name for path in layout.resume(case.cell).iterdir()} <= {"lock"}


# ---------------------------------------------------------------- shared weights and batches


def weights_before_training(case, layout, masked=True):
    session = prepare_session(case.study, case.cell, layout, CPU)
    if masked:
        session.stages[0].before_fit(session.run)
    return {name: module.weight.detach() for name, module in prunable(session.run.model).items()}


@pytest.mark.parametrize("method", SCRATCH)
def test_methods_from_scratch_start_from_the_weights_of_dense(method, trained):
    dense = weights_before_training(*trained("dense"))
    own = registry.entry("method", method).literals.get("OWN_START", False)
    if own:  # its stage may change them
        assert weights_before_training(*trained(method)).keys() == dense.keys()
    for name, weight in weights_before_training(*trained(method), masked=not own).items():
        kept = weight != 0
        assert torch.equal(weight[kept].abs(), dense[name][kept].abs())
        assert torch.equal(weight[kept].sign(), dense[name][kept].sign())


@pytest.mark.parametrize("method", sorted(set(METHODS) - set(SCRATCH)))
def test_pruning_methods_start_from_the_last_weights_of_dense(method, trained):
    case, layout = trained(method)
    dense, dense_layout = trained("dense")
    start = prepare_session(case.study, case.cell, layout, CPU).run.model.state_dict()
    last = dense.network(dense_layout, "last").state_dict()
    assert all(torch.equal(start[name], value) for name, value in last.items())


def batches(case, layout, epoch):
    session = prepare_session(case.study, case.cell, layout, CPU)
    return [source.order.tolist() for source in session.batches.epoch(epoch).sources]


@pytest.mark.parametrize("method", METHODS)
def test_methods_see_the_batches_of_dense(method, trained):
    for epoch in range(3):
        assert batches(*trained(method), epoch) == batches(*trained("dense"), epoch)


def test_each_epoch_uses_every_image_at_most_once_in_another_order(trained):
    case, layout = trained("dense")
    first, second = (
        [index for batch in batches(case, layout, epoch) for index in batch] for epoch in (0, 1)
    )
    assert len(set(first)) == len(first) == case.batches * case.study.training.batch_size
    assert first != second
    assert batches(case, layout, 0) != batches(*trained("dense", seed=1), 0)


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_under_every_objective(method, objective, trained):
    case, layout = trained(method, objective=objective)
    record = case.results(layout)["record"]
    assert record["failure"] == ""
    assert all(math.isfinite(point["loss"]) for point in record["curve"])
    model = case.network(layout, "last")
    asked = keep_count(weight_count(model), case.cell.sparsity)
    if adapts_sparsity(method):
        asked = record["curve"][-1]["active_weights"]
    assert abs(nonzero_count(model) - asked) <= len(prunable(model))
