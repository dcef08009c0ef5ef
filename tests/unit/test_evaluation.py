"""The evaluation and the attacks: sizes, known results, and agreement with the packages."""

import json
import logging

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from robsparse import models
from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.base.files import file_checksum, write_record
from robsparse.datasets import Part
from robsparse.eval import autoattack, clean, pgd
from robsparse.evaluation import job, sanity_checks
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.evaluate import evaluate_cell
from robsparse.evaluation.job import first_examples
from robsparse.evaluation.measure import magnitude_histogram, measure_network
from robsparse.evaluation.record import chance_columns, image_outcomes, result_rows
from robsparse.evaluation.runner import AttackResult, attack_model
from robsparse.evaluation.tally import correct_flags
from robsparse.networks import weights
from robsparse.records.evaluation_record import read_record
from robsparse.records.rows import Row, wilson_interval
from robsparse.sparsity.layers import prunable
from robsparse.study.cells import Layout, derive_seed
from robsparse.study.planned import Attack
from robsparse.study.targets import Target

CPU = torch.device("cpu")
EPS = 0.1


def attack_context(eps=EPS, seed=3, batch_size=4):
    return AttackContext("Linf", eps, seed, batch_size, CPU, report=lambda text: None)


def small_cnn(width=4, seed=0):
    torch.manual_seed(seed)
    params = registry.entry("arch", "small_cnn").params(width=width)
    return models.build("small_cnn", params, (1, 8, 8), 10).eval()


# ---------------------------------------------------------------- sizes


def test_sizes_of_small_cnn_by_hand():
    # positions of the three convolutions: 8x8, 4x4, 2x2; 256 features of 4 channels * ... * 2x2
    found = measure_network(small_cnn(), (1, 8, 8))
    sizes = [4 * 9, 8 * 4 * 9, 16 * 8 * 9, 16 * 4 * 10]
    positions = [64, 16, 4, 1]
    assert [layer["size"] for layer in found.layers] == sizes
    assert [layer["positions"] for layer in found.layers] == positions
    dense = 64 * 36 + 16 * 288 + 4 * 1152 + 640
    assert found.columns == {
        "prunable": 36 + 288 + 1152 + 640,
        "nonzero": 36 + 288 + 1152 + 640,
        "sparsity_reached": 0.0,
        "layers": 4,
        "dense_macs": dense,
        "sparse_macs": dense,
    }
    assert dense == 12_160


def test_zeros_count_for_each_position_of_their_use():
    model = small_cnn()
    with torch.no_grad():
        model[0].weight[0] = 0  # 9 of the weights used at 64 positions
        model[3].weight.flatten()[:100] = 0  # used at 16 positions
    columns = measure_network(model, (1, 8, 8)).columns
    assert columns["nonzero"] == 2116 - 109
    assert columns["sparsity_reached"] == pytest.approx(109 / 2116)
    assert columns["dense_macs"] == 12_160
    assert columns["sparse_macs"] == 12_160 - 9 * 64 - 100 * 16


def test_grouped_convolution_counts_only_existing_weights():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Flatten(), nn.Linear(8, 2)).eval()
    assert measure_network(model, (4, 3, 3)).columns["dense_macs"] == 8 * 2 * 9 + 16


def test_measuring_does_not_change_the_network():
    model = small_cnn()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_network(model, (1, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


class Uneven(nn.Module):
    """A layer that is never used, one that is used twice, and one that is applied to each pixel."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(5, 7)
        self.twice = nn.Conv2d(2, 2, 3, padding=1)
        self.pixel = nn.Linear(2, 3)

    def forward(self, x):
        x = self.twice(self.twice(x))
        return self.pixel(x.flatten(2).transpose(1, 2)).mean(1)


def test_a_layer_is_counted_for_each_use():
    found = measure_network(Uneven().eval(), (2, 4, 5))
    positions = {layer["layer"]: layer["positions"] for layer in found.layers}
    assert positions == {"unused": 0, "twice": 2 * 20, "pixel": 20}
    assert found.columns["prunable"] == 35 + 36 + 6
    assert found.columns["dense_macs"] == 36 * 40 + 6 * 20


def test_a_network_without_prunable_layers_is_measured():
    found = measure_network(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten()).eval(), (1, 2, 2))
    assert found.layers == found.histogram == []
    assert set(found.columns.values()) == {0}


# ---------------------------------------------------------------- test images


def part(x=None, y=None):
    x = torch.linspace(0, 1, 5).view(5, 1, 1, 1) if x is None else x
    return Part(x, torch.arange(len(x)) if y is None else y)


def test_first_examples_are_the_first_ones():
    found = first_examples(part(), 3, 5)
    assert found.y_N.tolist() == [0, 1, 2]
    assert torch.equal(found.x_NCHW, part().x_NCHW[:3])


def test_chance_is_that_of_the_whole_test_set():
    # No test image has class 3, and half of them have class 1.
    found = chance_columns(part(torch.zeros(8, 1, 1, 1), torch.tensor([0, 0, 2, 2, 1, 1, 1, 1])), 4)
    assert found == {"classes": 4, "chance": 0.5}
    assert chance_columns(part(torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])), 2)["chance"] == 0.5


def test_too_many_examples_are_refused():
    assert len(first_examples(part(), 5, 5)) == 5
    with pytest.raises(UsageError, match="n_examples = 6: the test split has 5 images"):
        first_examples(part(), 6, 5)


@pytest.mark.parametrize("value", [-0.001, 1.001, 255.0, float("nan")])
def test_images_outside_the_unit_interval_are_refused(value):
    x = part().x_NCHW.clone()
    x[2] = value
    with pytest.raises(UsageError, match=r"expected values in \[0,1\]"):
        first_examples(part(x), 5, 5)
    if not np.isnan(value):
        assert (
            len(first_examples(part(x), 2, 5)) == 2
        )  # the wrong value is not in the first two images


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_outside_the_classes_are_refused(label):
    y = torch.tensor([0, 1, label, 3, 4])
    with pytest.raises(UsageError, match=r"expected 0\.\.4"):
        first_examples(part(y=y), 5, 5)


# ---------------------------------------------------------------- a linear model, by hand


WEIGHT = torch.tensor([1.0, -2.0, 0.5, 0.0])
MARGINS = torch.tensor([0.5, 0.34, -0.36, 0.36, -0.5, 0.1, -0.1, -0.34, 0.2])


class Line(nn.Module):
    """Logits (-w.(x - 1/2), +w.(x - 1/2)): the margin falls by at most eps * |w|_1 = 0.35."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.sizes = []

    def forward(self, x):
        self.sizes.append(len(x))
        score = (x.flatten(1) - 0.5) @ self.weight
        return torch.stack([-score, score], dim=1)


def line_images():
    """One image for each margin w.(x - 1/2), with correct labels; image 6 has a wrong label."""
    direction = WEIGHT / WEIGHT.square().sum()
    x = 0.5 + MARGINS[:, None] * direction
    labels = (MARGINS > 0).long()
    labels[6] = 1
    return x.view(-1, 1, 2, 2), labels


ROBUST = (MARGINS.abs() > EPS * 3.5) & (MARGINS != -0.1)


def test_clean_accuracy_by_hand():
    x, y = line_images()
    outcome = clean.run(Line(), x, y, clean.Params(), attack_context(0.0))
    assert outcome.components["all"].tolist() == [True] * 6 + [False] + [True] * 2
    assert outcome.max_perturbation == 0.0


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_pgd_finds_exactly_the_images_that_can_be_broken(batch_size):
    x, y = line_images()
    right = torch.arange(len(y)) != 6
    params = pgd.Params(steps=10, restarts=2)
    outcome = pgd.run(Line(), x[right], y[right], params, attack_context(batch_size=batch_size))
    assert outcome.components["all"].tolist() == ROBUST[right].tolist()
    assert outcome.max_perturbation == pytest.approx(EPS)
    assert outcome.settings == {"steps": 10, "restarts": 2}
    assert outcome.nan_count == 0


def test_pgd_steps_have_the_relative_length():
    """A step of 2.5 eps reaches the surface of the ball. A step of 0.01 eps does not."""
    x, y = line_images()
    for relative, expected in ((2.5, ROBUST[:2]), (1e-3, torch.tensor([True, True]))):
        torch.manual_seed(0)
        params = pgd.Params(steps=1, restarts=1, relative_step=relative)
        outcome = pgd.run(Line(), x[:2], y[:2], params, attack_context())
        assert outcome.components["all"].tolist() == expected.tolist()


def test_largest_perturbation_is_that_of_all_batches():
    # The second image is in a corner of the box, so the attack cannot move it further.
    x = torch.tensor([[0.5, 0.5, 0.5, 0.5], [1.0, 0.0, 1.0, 0.5]]).view(2, 1, 2, 2)
    params = pgd.Params(steps=10, restarts=1)
    for order in ([0, 1], [1, 0]):
        y = torch.zeros(2, dtype=torch.int64)
        outcome = pgd.run(Line(), x[order], y, params, attack_context(batch_size=1))
        assert outcome.max_perturbation == pytest.approx(EPS)
    alone = pgd.run(Line(), x[1:], y[:1], params, attack_context(batch_size=1))
    assert alone.max_perturbation < 0.99 * EPS


def test_restart_attacks_only_the_survivors():
    x, y = line_images()
    model = Line()
    right = torch.arange(len(y)) != 6
    params = pgd.Params(steps=3, restarts=3)
    pgd.run(model, x[right], y[right], params, attack_context(batch_size=100))
    assert model.sizes[:4] == [8] * 4
    assert model.sizes[4] == 4
    assert sum(model.sizes) == 8 * 4 + 2 * 4 * 4


@pytest.mark.parametrize("restarts", [1, 3])
def test_more_restarts_never_leave_more_images(restarts):
    model, x, y = trained()
    fewer, more = (
        pgd.run(model, x, y, pgd.Params(steps=2, restarts=n), attack_context(0.08)).components[
            "all"
        ]
        for n in (restarts, restarts + 2)
    )
    assert not (more & ~fewer).any()


def clean_and_pgd(steps: int) -> list[Attack]:
    return [
        Attack("clean", "clean", clean.Params(), "Linf", 0.0),
        Attack("pgd", "pgd", pgd.Params(steps=steps, restarts=1), "Linf", EPS),
    ]


def test_attacks_get_only_correct_images_and_flags_cover_all_images():
    x, y = line_images()
    model = Line().train()
    first, second = attack_model(
        model, Part(x, y), clean_and_pgd(steps=10), seed=0, batch_size=100, device=CPU
    )
    assert not model.training
    assert model.sizes[:2] == [9, 8]
    assert int(first.robust["all"].sum()) == 8
    assert second.robust["all"].tolist() == ROBUST.tolist()
    assert first.context.eps == 0.0
    assert second.context.eps == EPS
    assert second.context.seed == derive_seed("attack", "pgd", 0) % 2**31
    arrays = image_outcomes(second, Part(x, y))
    assert arrays["pgd.all"].tolist() == ROBUST.tolist()
    # The broken images, each with its adversarial version, by index among all images.
    assert set(arrays["pgd.pictured"]) == {1, 5, 7, 8}
    pairs = torch.from_numpy(arrays["pgd.pictures"]).float()
    assert torch.allclose(pairs[:, 0], x[torch.from_numpy(arrays["pgd.pictured"])], atol=1e-3)
    assert (pairs[:, 1] - pairs[:, 0]).abs().amax((1, 2, 3)).allclose(torch.tensor(EPS), atol=1e-3)


def test_model_in_train_mode_is_put_into_eval_mode_for_every_pass():
    model = small_cnn().train()
    modes = []
    model[1].register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack_model(
        model,
        Part(torch.rand(5, 1, 8, 8), torch.arange(5)),
        clean_and_pgd(steps=1),
        seed=0,
        batch_size=2,
        device=CPU,
    )
    assert modes
    assert not any(modes)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_rows_of_an_attack_by_hand():
    outcome = Outcome(
        {"one": torch.tensor([True, True]), "two": torch.tensor([True, False])},
        {"version": "v"},
        ["first warning", "second warning"],
        max_perturbation=0.1,
        nan_count=0,
    )
    flags = {"one": torch.tensor([1, 1, 0, 0]), "two": torch.tensor([1, 0, 0, 0])}
    robust = {name: value.bool() for name, value in flags.items()}
    result = AttackResult(
        "mine", robust | {"all": robust["two"]}, outcome, attack_context(), 1.23456, torch.arange(2)
    )
    common = {
        name: 1 if field.annotation in (int, float) else "x"
        for name, field in Row.model_fields.items()
        if field.is_required()
        and name
        not in {
            *("attack", "component", "accuracy", "n_correct", "n_examples", "ci_low", "ci_high"),
            *("norm", "eps"),
        }
    }
    common |= {"sparsity": 0.5, "code_dirty": False}
    one, two, whole = result_rows(result, common)
    assert [row.component for row in (one, two, whole)] == ["one", "two", "all"]
    assert [row.n_correct for row in (one, two, whole)] == [2, 1, 1]
    assert [row.accuracy for row in (one, two, whole)] == [0.5, 0.25, 0.25]
    assert (whole.ci_low, whole.ci_high) == wilson_interval(1, 4)
    assert [row.warnings for row in (one, whole)] == ["", "first warning; second warning"]
    assert [row.max_perturbation for row in (one, whole)] == [None, 0.1]
    assert [row.attack_seconds for row in (one, whole)] == [None, 1.235]
    assert {row.version for row in (one, two, whole)} == {"v"}
    assert {row.eps for row in (one, two, whole)} == {EPS}
    assert {row.attack for row in (one, two, whole)} == {"mine"}


def test_correct_flags_do_not_depend_on_the_batch_size():
    model, x, y = trained()
    y = (y + (torch.arange(len(y)) % 3 == 0)) % 10
    expected = model(x).argmax(1) == y
    for size in (1, 3, 100):
        assert torch.equal(correct_flags(model, Part(x, y), size, CPU), expected)
    assert correct_flags(model, Part(x[:0], y[:0]), 5, CPU).shape == (0,)


# ---------------------------------------------------------------- a small network


_TRAINED = []


def trained():
    """A small network that classifies 16 images correctly, some of them robustly at EPS."""
    if not _TRAINED:
        model = small_cnn()
        generator = torch.Generator().manual_seed(1)
        centres = torch.rand(10, 1, 8, 8, generator=generator)
        y = torch.arange(10).repeat(4)
        noise = torch.randn(40, 1, 8, 8, generator=generator)
        x = (centres[y] + 0.3 * noise).clamp(0, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        right = (model.eval()(x).argmax(1) == y).nonzero().squeeze(1)[:16]
        _TRAINED.extend([model, x[right], y[right]])
    return _TRAINED


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_flags_of_pgd_do_not_depend_on_the_batch_size(batch_size):
    model, x, y = trained()
    params = pgd.Params(steps=3, restarts=3)
    flags = [
        pgd.run(model, x, y, params, attack_context(0.08, batch_size=size)).components["all"]
        for size in (batch_size, 100)
    ]
    assert 0 < int(flags[0].sum()) < 16  # otherwise they would be equal in any case
    assert torch.equal(*flags)


def test_pgd_agrees_with_a_slow_loop_over_single_images():
    model, x, y = trained()
    params, eps = pgd.Params(steps=3, restarts=2), 0.08
    generator = torch.Generator().manual_seed(3)
    starts = [torch.rand(x.shape, generator=generator) for _ in range(params.restarts)]
    expected = []
    for i in range(len(y)):
        survives = True
        for noise in starts:
            clean_image = x[i : i + 1]
            image = (clean_image + eps * (2 * noise[i : i + 1] - 1)).clamp(0, 1)
            for _ in range(params.steps):
                image = image.detach().requires_grad_(True)
                nn.functional.cross_entropy(model(image), y[i : i + 1]).backward()
                image = image.detach() + 2.5 * eps / params.steps * image.grad.sign()
                image = clean_image + (image - clean_image).clamp(-eps, eps)
                image = image.clamp(0, 1)
            survives &= int(model(image).argmax()) == int(y[i])
        expected.append(survives)
    model.zero_grad(set_to_none=True)
    found = pgd.run(model, x, y, params, attack_context(eps)).components["all"]
    assert found.tolist() == expected


# ---------------------------------------------------------------- AutoAttack


class Quick(AutoAttack):
    """AutoAttack with a fraction of its steps and queries."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.square.n_queries = 60
        self.fab.n_iter = 5
        self.apgd.n_iter = self.apgd_targeted.n_iter = 2


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(autoattack, "AutoAttack", Quick)


@pytest.mark.parametrize(("eps", "batch_size"), [(0.09, 5), (0.08, 100)])
def test_components_run_alone_give_the_outcome_of_one_stock_run(eps, batch_size, quick):
    model, x, y = trained()
    found = autoattack.run(
        model, x, y, autoattack.Params(), attack_context(eps, batch_size=batch_size)
    )
    names = ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert list(found.components) == names
    for n in range(1, 5):
        stock = Quick(model, norm="Linf", eps=eps, version="standard", seed=3, device="cpu")
        stock.attacks_to_run = names[:n]
        with torch.random.fork_rng():
            x_adv, y_adv = stock.run_standard_evaluation(x, y, batch_size=batch_size)
        assert torch.equal(found.components[names[n - 1]], y_adv == y)
        with torch.no_grad():
            assert torch.equal(model(x_adv).argmax(1) == y, y_adv == y)
    assert found.max_perturbation == pytest.approx(float((x_adv - x).abs().max()))
    counts = [int(flags.sum()) for flags in found.components.values()]
    assert 16 > counts[0] > counts[2] >= counts[3] > 0  # otherwise the test shows little
    model.zero_grad(set_to_none=True)


def test_stock_budgets_are_those_of_the_standard_version():
    """Quick attacks that only these tests use."""
    attack = autoattack.AutoAttack(nn.Identity(), eps=EPS, seed=0)
    assert attack.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert (attack.apgd.n_iter, attack.square.n_queries) == (100, 5000)
    assert autoattack.AutoAttack is AutoAttack


def test_fewer_than_ten_classes_have_fewer_targets(quick):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    x = torch.rand(6, 1, 8, 8)
    y = model(x).argmax(1)
    found = autoattack.run(model, x, y, autoattack.Params(), attack_context(0.001))
    assert list(found.components) == ["apgd-ce", "apgd-t", "fab-t", "square"]


def softmax_net():
    model, x, y = trained()
    return nn.Sequential(model, nn.Softmax(dim=1)).eval(), x[:4], y[:4]


def logger_state():
    logger = logging.getLogger("auto-attack")
    return list(logger.handlers), logger.propagate, logger.level, logger.disabled


@pytest.mark.parametrize("root_level", [logging.WARNING, logging.ERROR])
def test_warnings_of_the_package_are_captured_once_each(root_level, quick):
    model, x, y = softmax_net()
    root = logging.getLogger()
    before = root.level
    root.setLevel(root_level)
    try:
        outcome = autoattack.run(model, x, y, autoattack.Params(), attack_context(1e-3))
    finally:
        root.setLevel(before)
    found = [text for text in outcome.warnings if "probability distribution" in text]
    assert len(found) == 1
    assert "See" not in found[0]
    assert len(set(outcome.warnings)) == len(outcome.warnings)


def test_network_without_faults_gets_no_warning(quick):
    model, x, y = trained()
    assert (
        autoattack.run(model, x[:4], y[:4], autoattack.Params(), attack_context(1e-3)).warnings
        == []
    )


def test_warnings_are_not_printed_too(quick, caplog):
    model, x, y = softmax_net()
    with caplog.at_level(logging.DEBUG):
        autoattack.run(model, x, y, autoattack.Params(), attack_context(1e-3))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("fails", [False, True])
def test_logger_of_the_package_is_not_changed(fails, quick):
    model, x, y = softmax_net()
    before = logger_state()
    if fails:
        with pytest.raises(RuntimeError):
            autoattack.run(model, x[:, :, :3, :1], y, autoattack.Params(), attack_context())
    else:
        autoattack.run(model, x, y, autoattack.Params(), attack_context(1e-3))
    assert logger_state() == before


class SquareBreaksTwo(AutoAttack):
    """Square breaks two images. The other components break none."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.broken = 0
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.perturb = lambda x, y: x
        self.square.perturb = self.search

    def search(self, x, y):
        """Change two images of the first batch."""
        found = x.clone()
        if not self.broken:
            found[:2] = x[:2].flip(0)  # images of another class
            self.broken = 2
        return found


def test_square_that_is_stronger_than_white_box_attacks_gives_a_warning(monkeypatch):
    monkeypatch.setattr(autoattack, "AutoAttack", SquareBreaksTwo)
    model, x, y = trained()
    outcome = autoattack.run(model, x, y, autoattack.Params(), attack_context())
    assert [int(flags.sum()) for flags in outcome.components.values()] == [16, 16, 16, 14]
    (warning,) = outcome.warnings
    assert warning.startswith("Square broke 2 of the 16 images")


# ---------------------------------------------------------------- a whole evaluation


def test_record_and_flags_of_an_evaluation_agree(study_data, load_study, tmp_path):
    study_data["evaluation"] |= {"n_examples": 12, "batch_size": 5}
    study_data["evaluation"]["attacks"]["pgd"] = {"steps": 2, "restarts": 1}
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    model = small_cnn()
    with torch.no_grad():
        for module in prunable(model).values():
            module.weight.mul_(torch.rand_like(module.weight) < 0.5)
    weights.save(layout.model(cell, "last"), model.state_dict())
    path = evaluate_cell(study, cell, "last", layout, device="cpu")
    record = read_record(path)
    rows, layers = record.rows, record.layers
    with np.load(layout.flags(cell, "last")) as stored:
        flags = dict(stored)
    assert [row.attack for row in rows] == ["clean", "pgd"]
    assert flags.keys() - {"pgd.pictured", "pgd.predicted", "pgd.pictures"} == {
        "labels",
        "clean.all",
        "pgd.all",
    }
    for row in rows:
        assert row.n_correct == int(flags[f"{row.attack}.all"].sum())
        assert row.n_examples == len(flags["labels"]) == 12
        assert row.nonzero == sum(layer["nonzero"] for layer in layers)
        assert row.model_checksum == file_checksum(layout.model(cell, "last"))
        assert (row.method, row.seed, row.selection) == (cell.method, cell.seed, "last")
        assert row.epochs is None  # the training of these weights is not known
    assert sum(part["count"] for part in record.histogram) == rows[0].nonzero
    assert path == layout.evaluation(cell, "last")
    before = json.loads(path.read_text())
    evaluate_cell(study, cell, "last", layout, device="cpu")
    after = json.loads(path.read_text())
    for content in (before, after):
        del content["checksum"]
        for row in content["rows"]:
            del row["attack_seconds"]
    assert before == after


def test_weights_that_training_did_not_save_are_not_attacked(study_data, load_study, tmp_path):
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    path = layout.model(cell, "last")
    weights.save(path, small_cnn().state_dict())
    saved = {"last": file_checksum(path)}
    write_record(layout.training(cell), {"cost": None, "curve": [], "weights": saved})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"last\.safetensors: damaged or changed"):
        evaluate_cell(study, cell, "last", layout, device="cpu")
    assert not layout.evaluation(cell, "last").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_cache_is_deleted_after_the_record_is_written_or_before_with_fresh(
    fresh, study_data, load_study, tmp_path, monkeypatch
):
    study_data["evaluation"] |= {"n_examples": 12, "batch_size": 5}
    study_data["evaluation"]["attacks"]["pgd"] = {"steps": 2, "restarts": 1}
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    weights.save(layout.model(cell, "last"), small_cnn().state_dict())
    parts, seen = layout.cache(cell, "last"), []
    parts.mkdir(parents=True)
    (parts / "kept.npz").write_bytes(b"of a killed run")
    examine = sanity_checks.examine

    def looking(*words, **options):
        seen.extend(path.name for path in parts.glob("*.npz"))
        return examine(*words, **options)

    monkeypatch.setattr(sanity_checks, "examine", looking)
    evaluate_cell(study, cell, "last", layout, device="cpu", fresh=fresh)
    assert ("kept.npz" in seen) != fresh
    assert len(seen) == 2 + ("kept.npz" in seen)
    assert not parts.exists()


def test_second_evaluation_of_a_network_that_is_being_attacked_ends_in_one_line(
    study_data, load_study, tmp_path, monkeypatch
):
    study_data["evaluation"] |= {"n_examples": 4, "batch_size": 4}
    study_data["evaluation"]["selections"] = {"last": ["clean"]}
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    weights.save(layout.model(cell, "last"), small_cnn().state_dict())
    examine, refused = sanity_checks.examine, []

    def meanwhile(*words, **options):
        """A second evaluation starts while the first one has finished its attacks."""
        for fresh in (False, True):
            with pytest.raises(UsageError, match="another process is running the same job"):
                evaluate_cell(study, cell, "last", layout, device="cpu", fresh=fresh)
            refused.append(len([*layout.cache(cell, "last").glob("*.npz")]))
        return examine(*words, **options)

    monkeypatch.setattr(sanity_checks, "examine", meanwhile)
    evaluate_cell(study, cell, "last", layout, device="cpu")
    assert refused == [1, 1]  # the finished attack is still in the cache of the first one
    monkeypatch.setattr(sanity_checks, "examine", examine)
    evaluate_cell(study, cell, "last", layout, device="cpu")  # the lock was released


def test_evaluation_of_other_weights_does_not_touch_the_cache_of_the_cell(
    study_data, load_study, tmp_path
):
    study_data["evaluation"] |= {"n_examples": 4, "batch_size": 4}
    study_data["evaluation"]["selections"] = {"last": ["clean"]}
    study = load_study(study_data)
    cell, layout = study.cells()[0], Layout(tmp_path / "run")
    weights.save(tmp_path / "other.safetensors", small_cnn().state_dict())
    cached = layout.cache(cell, "last") / "kept.npz"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"of a killed run")
    target = Target.beside_file(tmp_path / "other.safetensors", "names", study.threat)
    for fresh in (False, True):
        evaluate_cell(study, cell, "last", layout, target=target, device="cpu", fresh=fresh)
        assert cached.exists()
    assert not target.cache.exists()


def test_surrogate_of_a_transfer_attack_is_the_other_network_of_that_selection(
    study_data, load_study, tmp_path
):
    study_data["evaluation"] |= {"n_examples": 4, "batch_size": 4}
    study_data["evaluation"]["attacks"]["transfer"] = {"surrogate": "dense", "steps": 1}
    study_data["evaluation"]["selections"] = {"last": ["transfer"], "best_val": ["clean"]}
    study_data["grid"]["seeds"] = [0, 1]
    study = load_study(study_data)
    layout = Layout(tmp_path / "run")
    cell = next(cell for cell in study.cells() if cell.method == "bcs" and cell.seed == 0)
    dense = next(cell for cell in study.cells() if cell.method == "dense" and cell.seed == 1)
    for seed, (one, selection) in enumerate(
        (one, selection) for one in (cell, dense) for selection in ("last", "best_val")
    ):
        weights.save(layout.model(one, selection), small_cnn(seed=seed).state_dict())
    found = job.resolve(study, cell, "last", layout, target=None, device=torch.device("cpu"))
    surrogate = found.surrogate("dense")
    assert not surrogate.training
    for name, value in small_cnn(seed=2).state_dict().items():
        assert torch.equal(surrogate.state_dict()[name], value)


def test_magnitudes_are_counted_in_tenths_of_a_decade():
    model = nn.Sequential(nn.Linear(6, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1e-15, -0.5, 0.5, 1.0, -1e6]]))
    found = magnitude_histogram(model)
    assert [part["count"] for part in found] == [1, 2, 1, 1]
    assert (found[0]["low"], found[-1]["low"]) == (0.0, 100.0)
    assert found[1]["low"] <= 0.5 < found[1]["high"]
    assert found[2]["low"] == pytest.approx(1.0)
    assert found[2]["high"] == pytest.approx(10**0.1)
