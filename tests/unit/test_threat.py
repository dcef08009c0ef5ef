"""Norm and eps in training, validation, attacks and planning."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from robsparse import datasets
from robsparse.base.errors import UsageError
from robsparse.compute import perturb
from robsparse.compute.perturb import length
from robsparse.evaluation import evaluate
from robsparse.evaluation.attacks import Outcome
from robsparse.evaluation.job import first_examples
from robsparse.evaluation.runner import attack_model
from robsparse.networks import construct
from robsparse.schema.fields import radius
from robsparse.schema.threat import Threat
from robsparse.schema.training import Training
from robsparse.study.cells import Layout
from robsparse.tools import planning
from robsparse.training.loop import train_cell

CPU = torch.device("cpu")
TRAINED, TESTED = 0.05, 0.3


@pytest.fixture
def crafted(monkeypatch):
    """Record norm, eps and the largest perturbation of every call that perturbs images."""
    calls, ascend = [], perturb.ascend

    def watched(model, x, start, loss, **options):
        found = ascend(model, x, start, loss, **options)
        norm = options.get("norm", "Linf")
        calls.append((norm, options["eps"], float(length(found - x, norm).max())))
        return found

    monkeypatch.setattr(perturb, "ascend", watched)
    return calls


def cell_of(study, method):
    return next(cell for cell in study.cells() if cell.method == method)


def trained(study, folder):
    """Return all weights of the BCS network of the study after an epoch of training."""
    cell, layout = cell_of(study, "bcs"), Layout(folder)
    train_cell(study, cell, layout, device="cpu")
    return load_file(layout.model(cell, "last"))


# ---------------------------------------------------------------- training and validation


@pytest.mark.parametrize("place", ["section", "block", "block over section"])
def test_training_and_validation_use_the_eps_of_training(
    place, study_data, load_study, tmp_path, crafted
):
    """Same bits as with a threat of this eps. Other bits than with the threat of the attacks."""
    study_data["training"]["crafting"]["step_size"] = TRAINED
    study_data["threat"]["eps"] = TRAINED
    plain = trained(load_study(study_data), tmp_path / "plain")
    study_data["threat"]["eps"] = TESTED
    other = trained(load_study(study_data), tmp_path / "other")
    if place != "block":
        study_data["training"]["eps"] = TRAINED if place == "section" else 0.2
    if place != "section":
        study_data["grid"]["training"] = {"eps": TRAINED}
    crafted.clear()
    found = trained(load_study(study_data), tmp_path / "own")
    assert {(norm, eps) for norm, eps, _ in crafted} == {("Linf", TRAINED)}
    assert max(reach for *_, reach in crafted) == pytest.approx(TRAINED)
    assert len(crafted) > 1
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert any(not torch.equal(found[name], other[name]) for name in plain)


def test_training_eps_does_not_change_the_attacks(study_data, load_study, tmp_path, crafted):
    study_data["training"]["eps"] = 0.1
    study_data["evaluation"]["sanity_checks"] = {"n_examples": 5, "queries": 2}
    study = load_study(study_data)
    trained(study, tmp_path)
    crafted.clear()
    cell, layout = cell_of(study, "bcs"), Layout(tmp_path)
    evaluate.evaluate_cell(study, cell, "last", layout, device="cpu")
    assert {eps for _, eps, _ in crafted} == {0.15, 1.0}  # 1.0: a sanity check's


def test_training_and_validation_use_the_l2_norm(study_data, load_study, tmp_path, crafted):
    study_data["threat"] = {"norm": "L2", "eps": 1.5}
    study_data["training"]["crafting"]["step_size"] = 1.2
    trained(load_study(study_data), tmp_path)
    assert {(norm, eps) for norm, eps, _ in crafted} == {("L2", 1.5)}
    assert 1 < max(reach for *_, reach in crafted) <= 1.5 + 1e-5


# ---------------------------------------------------------------- attacks


def test_each_attack_uses_its_eps_or_that_of_the_threat(study_data, load_study):
    study_data["evaluation"]["attacks"] = {
        "pgd": {"steps": 2, "restarts": 1},
        "near": {"base": "pgd", "eps": "0.5/255", "steps": 2, "restarts": 1},
        "round": {"base": "pgd", "norm": "L2", "eps": 2.5, "steps": 2, "restarts": 1},
    }
    names = ["clean", "pgd", "near", "round"]
    study_data["evaluation"]["selections"] = {"last": names}
    study = load_study(study_data)
    cell = cell_of(study, "bcs")
    splits = datasets.load("digits", study.datasets["digits"])
    model = construct.build(study, cell, splits.image_shape, splits.classes).eval()
    found = attack_model(
        model,
        first_examples(splits.test, 8, splits.classes),
        study.planned[cell].attacks["last"],
        seed=0,
        batch_size=8,
        device=CPU,
    )
    expected = [("Linf", 0.0), ("Linf", 0.15), ("Linf", 0.5 / 255), ("L2", 2.5)]
    assert [(result.context.norm, result.context.eps) for result in found] == expected
    resolved = [study.attacks[name] for name in names]
    assert [(attack.norm, attack.eps) for attack in resolved] == expected


def test_a_planned_cell_has_all_threats(study_data, load_study):
    """Training, crafting, attacks and sanity checks, each resolved, in one object."""
    study_data["threat"]["eps"] = TESTED
    study_data["training"] |= {"eps": 0.2, "crafting": {"steps": 3, "step_size": 0.1}}
    study_data["grid"]["training"] = {"eps": TRAINED, "crafting": {"step_size": 0.02}}
    study_data["evaluation"]["attacks"] = {"pgd": {"steps": 2, "restarts": 1, "eps": 0.25}}
    study_data["evaluation"]["selections"] = {"last": ["pgd"], "best_val": ["fgsm"]}
    study = load_study(study_data)
    planned = study.planned[cell_of(study, "bcs")]
    assert planned.training_threat == Threat(eps=TRAINED)
    assert (planned.crafting.steps, planned.crafting.step_size) == (3, 0.02)
    found = {s: [(a.name, a.eps) for a in attacks] for s, attacks in planned.attacks.items()}
    assert found == {
        "last": [("clean", 0.0), ("pgd", 0.25)],
        "best_val": [("clean", 0.0), ("fgsm", TESTED)],
    }
    assert planned.sanity_check_threat == Threat(eps=TESTED)


def test_a_variant_of_clean_perturbs_nothing(study_data, load_study):
    study_data["evaluation"]["attacks"]["untouched"] = {"base": "clean"}
    study_data["evaluation"]["selections"] = {"last": ["untouched"]}
    study = load_study(study_data)
    splits = datasets.load("digits", study.datasets["digits"])
    model = construct.build(study, cell_of(study, "bcs"), splits.image_shape, splits.classes)
    found = attack_model(
        model.eval(),
        first_examples(splits.test, 8, splits.classes),
        [study.attacks["untouched"]],
        seed=0,
        batch_size=8,
        device=CPU,
    )
    assert found[0].context.eps == 0.0


# ---------------------------------------------------------------- plan


def test_plan_times_the_network_with_the_training_threat(study_data, load_study, monkeypatch):
    """A block with other settings is timed with these settings."""
    block = study_data["grid"] | {"sparsities": [0.9]}
    own = {"eps": 0.1, "crafting": {"bn_mode": "train", "step_size": 0.05}}
    study_data["grid"] = [block, block | {"sparsities": [0.99], "training": own}]
    study_data["grid"] = [b | {"methods": ["bcs"]} for b in study_data["grid"]]
    study = load_study(study_data)
    asked = []
    monkeypatch.setattr(planning, "_seconds_per_image", lambda work, most: work(1) or 0.0)
    ascend = perturb.ascend

    def watched(model, x, start, loss, **options):
        asked.append((options["eps"], options["step_size"], options["steps"]))
        return ascend(model, x, start, loss, **options)

    monkeypatch.setattr(perturb, "ascend", watched)
    clock = planning.Clock(study)
    for cell in study.cells():
        clock.step(cell)
    assert asked == [(0.15, 0.1, 1), (0.1, 0.05, 1)]


# ---------------------------------------------------------------- refused settings

L2 = {"norm": "L2", "eps": 2}
ERRORS = {
    "Linf above 1": (
        {"threat": {"eps": 1.5}},
        "threat.eps = 1.5: expected a number in (0, 1] pixel units for Linf, like 0.15 or '8/255'; "
        "nearest match: '1.5/255'",
    ),
    "training above 1": (
        {"training": {"eps": 8}},
        "training.eps = 8.0: expected a number in (0, 1] pixel units for Linf, like 0.15 or "
        "'8/255'; nearest match: '8/255'",
    ),
    "attack above 1": (
        {"evaluation": {"attacks": {"pgd": {"eps": 4}}}},
        "evaluation.attacks.pgd.eps = 4.0: expected a number in (0, 1] pixel units for Linf, like "
        "0.15 or '8/255'; nearest match: '4/255'",
    ),
    "attack of another norm": (
        {"evaluation": {"attacks": {"pgd": {"norm": "L2"}}}},
        "evaluation.attacks.pgd.eps: missing, expected a radius in L2; the threat has another norm",
    ),
    "attack of Linf in a study of L2": (
        {"threat": L2, "evaluation": {"attacks": {"pgd": {"norm": "Linf", "eps": 2}}}},
        "evaluation.attacks.pgd.eps = 2.0: expected a number in (0, 1]",
    ),
    "steps above eps": (
        {"training": {"crafting": {"step_size": 0.16}}},
        "training.crafting.step_size = 0.16: expected at most the eps of training; nearest "
        "match: 0.15",
    ),
    "steps above the block's eps": (
        {"grid": {"training": {"eps": 0.05}}},
        "grid.training.crafting.step_size = 0.1: expected at most the eps of training; "
        "nearest match: 0.05",
    ),
    "one step above two eps": (
        {"training": {"crafting": {"step_size": 0.31, "steps": 1}}},
        "training.crafting.step_size = 0.31: expected at most twice the eps of training; "
        "nearest match: 0.3",
    ),
    "L2 of zero": ({"threat": {"norm": "L2", "eps": 0}}, "threat.eps = 0: expected a number above"),
}


def merge(data, change):
    for key, value in change.items():
        if isinstance(value, dict):
            merge(data.setdefault(key, {}), value)
        else:
            data[key] = value


@pytest.mark.parametrize("error", ERRORS)
def test_invalid_radii_and_steps_give_one_line(error, study_data, load_study, tmp_path):
    change, reported = ERRORS[error]
    merge(study_data, change)
    with pytest.raises(UsageError) as caught:
        load_study(study_data)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'study.yaml'}: {reported}")
    assert "\n" not in message


def test_one_step_may_be_longer_than_eps(study_data, load_study):
    """Fast adversarial training: one step of 1.25 eps."""
    study_data["training"]["crafting"] |= {"steps": 1, "step_size": 1.25 * 0.15}
    assert load_study(study_data).training.crafting.step_size == 1.25 * 0.15


def test_l2_radii_may_be_above_one(study_data, load_study):
    study_data["threat"] = {"norm": "L2", "eps": 1.5}
    study_data["training"] |= {"eps": 1.25}
    study_data["training"]["crafting"]["step_size"] = 1.1
    study = load_study(study_data)
    assert study.threat == Threat(norm="L2", eps=1.5)
    assert study.planned[cell_of(study, "bcs")].training_threat == Threat(norm="L2", eps=1.25)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("0.5/255", 0.5 / 255),
        ("1.5/255", 1.5 / 255),
        (" 8 / 255 ", 8 / 255),
        ("0.1/1", 0.1),
        ("3/2.5e0", None),
        ("1e9999999/3", None),
        ("-1/255", None),
        ("1/0.0", None),
    ],
)
def test_ratios_of_decimals_are_read_exactly(written, meant):
    if meant is not None:
        assert radius(written) == meant
        return
    with pytest.raises(ValueError, match="expected a number above 0"):
        radius(written)


# ---------------------------------------------------------------- the default of the comparison


def test_agreement_with_the_original_package_runs_with_its_default_eps(
    load_benchmark, monkeypatch, capsys
):
    """`python benchmarks/agreement.py shipped`, with replaced attacks and network."""
    agreement = load_benchmark("agreement")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    part = datasets.Part(torch.rand(6, 1, 2, 2), torch.zeros(6, dtype=torch.int64))
    part = dataclasses.replace(part, y_N=model(part.x_NCHW).argmax(1))
    asked = []

    def stock(model, part, threat):
        asked.append(threat.eps)
        return torch.ones(len(part), dtype=torch.bool)

    class Attack:
        Params = Training.model_construct

        @staticmethod
        def run(view, x, y, params, threat):
            asked.append(threat.eps)
            return Outcome({"all": torch.ones(len(y), dtype=torch.bool)})

    monkeypatch.setattr(agreement, "_shipped", lambda arguments: (model, part))
    monkeypatch.setattr(agreement, "_stock", stock)
    monkeypatch.setattr(agreement.registry, "load", lambda kind, name: Attack)
    monkeypatch.setattr("sys.argv", ["agreement.py", "shipped"])
    agreement.main()
    assert asked == [0.5 / 255] * 2
    assert "images that differ: none" in capsys.readouterr().out
