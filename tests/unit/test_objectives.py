"""Losses, gradients and side effects on small networks, by hand."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from robsparse.compute import perturb
from robsparse.fast import folding
from robsparse.schema.threat import Crafting
from robsparse.sparsity.masks import apply_masks, effective_weights, magnitude_masks
from robsparse.study.cost import PASSES
from robsparse.training import objectives
from robsparse.training.objectives import OBJECTIVES, Attacker

EPS, STEP = 0.2, 0.05
W = torch.tensor([1.5, -2.0, 0.5])
X = torch.tensor([[0.5, 0.25, 0.75], [0.4, 0.9, 0.1]]).view(2, 1, 1, 3)
Y = torch.tensor([0, 1])


def linear():
    """Logits (0, w.x): the probability of class 1 is sigmoid(w.x)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([torch.zeros(3), W]))
    return model.train()


def attacker(steps=1, seed=5, bn_mode="eval"):
    crafting = Crafting(steps=steps, step_size=STEP, bn_mode=bn_mode)
    return Attacker(EPS, crafting, torch.Generator().manual_seed(seed))


def with_batch_norm():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, 3),
    )
    return model.train()


BATCH = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(2))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def loss_of(name, model, made=None, *, beta=6.0, x=BATCH, y=LABELS):
    return OBJECTIVES[name](model, x, y, made or attacker(), beta)


# ---------------------------------------------------------------- by hand


def logit(row):
    return sum(w * x for w, x in zip(W.tolist(), row, strict=True))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def cross_entropy(z, label):
    return math.log(1 + math.exp(z if label == 0 else -z))


def clip(value, centre):
    return min(max(value, centre - EPS, 0.0), centre + EPS, 1.0)


def moved(x, start, signs):
    """One signed step from `start`, projected to the ball around x and the box."""
    return [clip(s + STEP * sign, centre) for centre, s, sign in zip(x, start, signs, strict=True)]


def sign(value):
    return (value > 0) - (value < 0)


def adversarial_of_at(seed=5):
    """The start is uniform. The step reduces the probability of the label."""
    noise = torch.rand(X.shape, generator=torch.Generator().manual_seed(seed)).view(2, 3).tolist()
    rows = []
    for x, n, label in zip(X.view(2, 3).tolist(), noise, Y.tolist(), strict=True):
        start = [min(max(a + EPS * (2 * b - 1), 0.0), 1.0) for a, b in zip(x, n, strict=True)]
        rows.append(moved(x, start, [sign(w) * (1 if label == 0 else -1) for w in W.tolist()]))
    return rows


def adversarial_of_trades(seed=5):
    """The start is x + 0.001 N(0,1). The step goes away from x and does not depend on the label."""
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)).view(2, 3).tolist()
    rows = []
    for x, n in zip(X.view(2, 3).tolist(), noise, strict=True):
        start = [a + 0.001 * b for a, b in zip(x, n, strict=True)]
        away = sign(logit(start) - logit(x))
        rows.append(moved(x, start, [sign(w) * away for w in W.tolist()]))
    return rows


def test_natural_by_hand():
    expected = (
        sum(cross_entropy(logit(x), y) for x, y in zip(X.view(2, 3).tolist(), (0, 1), strict=True))
        / 2
    )
    assert loss_of("natural", linear(), x=X, y=Y).item() == pytest.approx(expected)


def test_at_by_hand():
    expected = sum(
        cross_entropy(logit(a), y) for a, y in zip(adversarial_of_at(), (0, 1), strict=True)
    )
    model = linear()
    loss = loss_of("at", model, x=X, y=Y)
    assert loss.item() == pytest.approx(expected / 2)
    loss.backward()
    gradient = torch.zeros(3)
    for a, y in zip(adversarial_of_at(), (0, 1), strict=True):
        gradient += (sigmoid(logit(a)) - y) * torch.tensor(a) / 2
    assert torch.allclose(model[1].weight.grad[1], gradient, atol=1e-6)


def test_mat_attacks_only_the_first_half_of_the_batch():
    model, rows = linear(), X.view(2, 3).tolist()
    (attacked, _), clean = (
        adversarial_of_at(),
        rows[1],
    )  # the first image has the same start as with `at`
    expected = (cross_entropy(logit(attacked), 0) + cross_entropy(logit(clean), 1)) / 2
    assert loss_of("mat", model, x=X, y=Y).item() == pytest.approx(expected)


def test_mat_leaves_the_larger_part_of_an_odd_batch_clean():
    x, y = torch.cat([X, X[1:]]), torch.tensor([0, 1, 0])
    rows = [adversarial_of_at()[0], *x.view(3, 3).tolist()[1:]]
    expected = sum(
        cross_entropy(logit(row), int(label)) for row, label in zip(rows, y, strict=True)
    )
    assert loss_of("mat", linear(), x=x, y=y).item() == pytest.approx(expected / 3)


def test_images_are_crafted_in_the_norm_of_the_attacker():
    made = dataclasses.replace(attacker(steps=10), norm="L2")
    change = made.attack_labels(linear(), X, Y) - X
    assert change.flatten(1).norm(dim=1).tolist() == pytest.approx([EPS, EPS], abs=0.02)
    change = made.attack_outputs(linear(), X) - X
    assert change.flatten(1).norm(dim=1).max() <= EPS + 1e-6


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_mat_of_one_image_is_clean(norm, known_network):
    model, part = known_network
    made = dataclasses.replace(attacker(), norm=norm)
    found = loss_of("mat", model, made, x=part.x_NCHW[:1], y=part.y_N[:1])
    expected = loss_of("natural", model, x=part.x_NCHW[:1], y=part.y_N[:1])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("beta", [6.0, 0.5])
def test_trades_by_hand(beta):
    expected = 0.0
    for x, a, y in zip(X.view(2, 3).tolist(), adversarial_of_trades(), (0, 1), strict=True):
        p, q = sigmoid(logit(x)), sigmoid(logit(a))
        divergence = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
        expected += (cross_entropy(logit(x), y) + beta * divergence) / 2
    assert loss_of("trades", linear(), beta=beta, x=X, y=Y).item() == pytest.approx(expected)


def test_trades_gradient_by_hand_flows_through_both_branches():
    model = linear()
    loss_of("trades", model, beta=2.0, x=X, y=Y).backward()
    expected, clean_branch = torch.zeros(3), torch.zeros(3)
    for x, a, y in zip(X.view(2, 3).tolist(), adversarial_of_trades(), (0, 1), strict=True):
        z, z_adv = logit(x), logit(a)
        p, q = sigmoid(z), sigmoid(z_adv)
        expected += (p - y) * torch.tensor(x) / 2
        # d KL / dz_adv = q - p, d KL / dz = p (1 - p) (z - z_adv)
        expected += 2.0 * (q - p) * torch.tensor(a) / 2
        clean_branch += 2.0 * p * (1 - p) * (z - z_adv) * torch.tensor(x) / 2
    assert clean_branch.abs().max() > 1e-3  # so the test would notice if it were missing
    assert torch.allclose(model[1].weight.grad[1], expected + clean_branch, atol=1e-5)


@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_mart_by_hand_with_the_constants_of_the_authors(sharpness):
    """Three classes. With sharp outputs, 1.0001, 1.0000001 and 1e-12 matter."""
    model = with_batch_norm().eval()
    model[3].p = 0.0
    model[-1].weight.data *= sharpness
    adversarial = attacker().attack_labels(model, BATCH, LABELS, perturb.gaussian_start)
    with torch.no_grad():
        rows = [torch.softmax(model(x).double(), 1).tolist() for x in (BATCH, adversarial)]
    expected = 0.0
    for clean, attacked, label in zip(*rows, LABELS.tolist(), strict=True):
        wrong = max(p for k, p in enumerate(attacked) if k != label)
        boosted = -math.log(attacked[label]) - math.log(1.0001 - wrong + 1e-12)
        divergence = sum(
            p * (math.log(p) - math.log(q + 1e-12))
            for p, q in zip(clean, attacked, strict=True)
            if p > 0
        )
        expected += boosted + 5.0 * divergence * (1.0000001 - clean[label])
    found = loss_of("mart", model, beta=5.0)
    assert found.item() == pytest.approx(expected / len(BATCH), rel=1e-4)
    if sharpness > 1:
        assert max(max(row) for row in rows[1]) > 0.9999


def test_crafted_images_of_both_attacks_by_hand():
    model = linear()
    found = attacker().attack_labels(model, X, Y).view(2, 3)
    assert torch.allclose(found, torch.tensor(adversarial_of_at()), atol=1e-6)
    found = attacker().attack_outputs(model, X).view(2, 3)
    assert torch.allclose(found, torch.tensor(adversarial_of_trades()), atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_a_mean_over_the_batch(name):
    """Repeating every image does not change the loss, except for the random start."""
    model = linear()
    one = loss_of(name, model, attacker(steps=8), x=X, y=Y).item()
    two = loss_of(name, model, attacker(steps=8), x=X.repeat(9, 1, 1, 1), y=Y.repeat(9)).item()
    assert two == pytest.approx(one, rel=0.2)  # a sum would be nine times larger


def test_stronger_crafting_raises_the_loss():
    model = with_batch_norm().eval()
    with torch.no_grad():
        natural = loss_of("natural", model)
    assert natural < loss_of("at", model, attacker(steps=1)) < loss_of("at", model, attacker(10))


def test_beta_has_a_default_in_the_study(study_data, load_study):
    study_data["training"]["beta"] = 0.5
    objective = objectives.make_objective("trades", load_study(study_data).training)
    found = objective(linear(), X, Y, attacker()).item()
    assert found == pytest.approx(loss_of("trades", linear(), beta=0.5, x=X, y=Y).item())


# ---------------------------------------------------------------- side effects


def craft(name, model, made):
    if name == "labels":
        return made.attack_labels(model, BATCH, LABELS)
    return made.attack_outputs(model, BATCH)


def calls_of(network, monkeypatch):
    """Record the mode and the outputs of every pass. (A hook would prevent a folded view.)

    The passes of a view are those of all views: each refresh makes a new one.
    """
    found, call = [], type(network).__call__

    def listen(module, *given):
        outputs = call(module, *given)
        if module is network or isinstance(module, folding.View):
            found.append((module.training, outputs))
        return outputs

    monkeypatch.setattr(type(network), "__call__", listen)
    return found


@pytest.mark.parametrize("name", ["labels", "outputs"])
def test_crafting_in_eval_mode_does_not_change_the_network(name):
    model = with_batch_norm()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    craft(name, model, attacker(steps=3))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["labels", "outputs"])
def test_crafting_uses_running_statistics_in_eval_and_those_of_the_batch_in_train_mode(
    name, monkeypatch
):
    model = with_batch_norm()
    with torch.no_grad():
        model[1].running_mean.fill_(5.0)
    view = folding.folded_view(model.eval(), BATCH)
    seen = calls_of(view, monkeypatch), calls_of(model, monkeypatch)
    craft(name, model.train(), attacker(steps=2))
    assert seen[0]  # a view has only running statistics
    assert not seen[1]
    seen[0].clear()
    craft(name, model, attacker(steps=2, bn_mode="train"))
    assert {training for training, _ in seen[1]} == {True}
    assert not seen[0]


@pytest.mark.parametrize(("name", "batches"), [("natural", 1), ("at", 1), ("trades", 2)])
def test_only_the_training_passes_update_the_statistics(name, batches):
    model = with_batch_norm()
    loss_of(name, model, attacker(steps=4))
    assert int(model[1].num_batches_tracked) == batches
    assert model.training


@pytest.mark.parametrize(("name", "batches"), [("natural", 1), ("at", 5), ("trades", 7)])
def test_crafting_in_train_mode_updates_the_statistics(name, batches):
    model = with_batch_norm()
    loss_of(name, model, attacker(steps=4, bn_mode="train"))
    assert int(model[1].num_batches_tracked) == batches


def test_trades_normalises_clean_and_adversarial_batches_apart():
    model = with_batch_norm()
    sizes = []
    model[1].register_forward_pre_hook(
        lambda module, inputs: sizes.append(len(inputs[0])) if module.training else None
    )
    loss_of("trades", model)
    assert sizes == [6, 6]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_global_random_numbers_are_not_drawn(name):
    model = with_batch_norm()
    model[3].p = 0.0
    before = torch.get_rng_state()
    loss_of(name, model)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_passes_are_those_of_a_step(name, steps, monkeypatch):
    model, backward = with_batch_norm(), []
    for x in (BATCH, BATCH[:3]):
        view = folding.folded_view(model.eval(), x)
    forward = calls_of(view, monkeypatch), calls_of(model.train(), monkeypatch)
    grad = torch.autograd.grad

    def counted(loss, x, *given, **named):
        if isinstance(x, torch.Tensor):  # not a single step of the folded view
            backward.append(len(x))
        return grad(loss, x, *given, **named)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    loss_of(name, model, attacker(steps=steps)).backward()
    sizes = [len(outputs) for calls in forward for _, outputs in calls]
    backward += [len(outputs) for _, outputs in forward[1] if outputs.requires_grad]
    # In batches: half of a batch is half a pass.
    assert (sum(sizes) / len(BATCH), sum(backward) / len(BATCH)) == PASSES[name](steps)
    assert set(sizes) <= {len(BATCH), len(BATCH) // 2}


def test_every_objective_has_its_passes():
    assert PASSES.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_do_not_depend_on_computing_the_effective_weights_once(name):
    """TRADES starts with a pass without gradients. The step must not use its weights."""
    gradients = []
    for once in (False, True):
        model = with_batch_norm()
        model[3].p = 0.0
        apply_masks(model, magnitude_masks(model, 0.5))
        if once:
            with effective_weights(model):
                loss_of(name, model).backward()
        else:
            loss_of(name, model).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0] if gradient.dim() > 1)


# ---------------------------------------------------------------- mart, eps and norm


def softmax(row):
    whole = sum(math.exp(z) for z in row)
    return [math.exp(z) / whole for z in row]


class Three(nn.Module):
    """Logits (a.x, b.x, 0), and a list of its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.5, -2.0, 0.5], [-1.0, 1.0, 2.0], [0.0] * 3]))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("beta", [6.0, 0.5])
def test_mart_by_hand(beta):
    model = Three().train()
    loss = loss_of("mart", model, beta=beta, x=X, y=Y)
    clean, adversarial = (x.flatten(1) for x in model.seen[-2:])
    assert torch.equal(clean, X.flatten(1))
    expected = 0.0
    for x, a, label in zip(clean, adversarial, Y.tolist(), strict=True):
        p, q = (softmax((model.weight @ row).tolist()) for row in (x, a))
        wrong = max(q[k] for k in range(3) if k != label)
        divergence = sum(c * math.log(c / d) for c, d in zip(p, q, strict=True))
        expected += -math.log(q[label]) - math.log(1.0001 - wrong)  # as the authors
        expected += beta * divergence * (1 - p[label])
    assert loss.item() == pytest.approx(expected / 2, rel=1e-5)


def test_mart_gradient_equals_a_numerical_one():
    model = Three().double().train()
    images, made = X.double(), attacker()

    def loss():
        made.generator.manual_seed(
            5
        )  # the same images each time, because a small change does not change a sign
        return OBJECTIVES["mart"](model, images, Y, made, 6.0)

    def at(i, j, change):
        model.weight.data[i, j] += change
        value = loss().item()
        model.weight.data[i, j] -= change
        return value

    loss().backward()
    for i, j in ((0, 0), (1, 2), (2, 1)):
        slope = (at(i, j, 1e-5) - at(i, j, -1e-5)) / 2e-5
        assert model.weight.grad[i, j].item() == pytest.approx(slope, rel=1e-4)


def test_mart_crafts_against_the_label_from_the_gaussian_start():
    model = Three().train()
    loss_of("mart", model, x=X, y=Y)
    start = perturb.gaussian_start(X, EPS, torch.Generator().manual_seed(5))
    loss, options = perturb.cross_entropy_of(Y), {"eps": EPS, "step_size": STEP, "steps": 1}
    assert torch.equal(model.seen[-1], perturb.ascend(model, X, start, loss, **options))


@pytest.mark.parametrize("craft", ["attack_labels", "attack_outputs"])
def test_scaled_attacker_scales_eps_and_step_size(craft):
    words = (linear(), X, Y) if craft == "attack_labels" else (linear(), X)
    full, half = attacker(steps=3), attacker(steps=3).scaled(0.5)
    short = Attacker(EPS / 2, Crafting(steps=3, step_size=STEP / 2), full.generator)
    found = getattr(half, craft)(*words)
    assert torch.equal(found, getattr(short, craft)(*words))
    assert float((found - X).abs().max()) <= EPS / 2 + 1e-6
    assert half.generator is not full.generator
    assert half.scaled(0.25).generator is half.generator  # one stream of random numbers


@pytest.mark.parametrize("craft", ["attack_labels", "attack_outputs"])
def test_crafting_uses_the_norm_of_the_threat(craft):
    words = (linear(), X, Y) if craft == "attack_labels" else (linear(), X)
    crafting = Crafting(steps=5, step_size=0.3)
    made = Attacker(0.3, crafting, torch.Generator().manual_seed(1), "L2")
    change = (getattr(made, craft)(*words) - X).flatten(1)
    lengths = change.norm(dim=1)
    assert float(lengths.max()) <= 0.3 + 1e-6
    assert float(lengths.max()) > 0.25
    along = change[0] / change[0].norm()
    assert abs(float(along @ W / W.norm())) == pytest.approx(1, abs=0.1)  # the gradient itself


def test_mat_attacks_the_first_half_and_gives_both_the_same_weight():
    model = Three().train()
    x, y = torch.cat([X, X[:1]]), torch.tensor([0, 1, 0])
    loss = loss_of("mat", model, x=x, y=y)
    seen = model.seen[-1]
    assert not torch.equal(seen[:1], x[:1])
    assert torch.equal(seen[1:], x[1:])
    logits = (seen.flatten(1) @ model.weight.T).tolist()
    expected = -sum(math.log(softmax(row)[k]) for row, k in zip(logits, y.tolist(), strict=True))
    assert loss.item() == pytest.approx(expected / 3, rel=1e-5)


def test_objective_of_a_training_has_its_beta(study_data, load_study):
    study_data["training"]["beta"] = 2.5
    training = load_study(study_data).training
    one = objectives.make_objective("trades", training)(linear(), X, Y, attacker())
    assert torch.equal(one, loss_of("trades", linear(), beta=2.5, x=X, y=Y))


# ---------------------------------------------------------------- label smoothing


def smoothed(rows, labels, share):
    """Mean cross entropy with the label at 1 - share and the others at share / (K - 1), summed."""
    total = 0.0
    for row, label in zip(rows, labels, strict=True):
        p = softmax(row)
        for k, value in enumerate(p):
            total -= (1 - share if k == label else share / (len(p) - 1)) * math.log(value)
    return total / len(rows)


def made_with(name, share, study_data, load_study):
    study_data["training"]["label_smoothing"] = share
    return objectives.make_objective(name, load_study(study_data).training)


@pytest.mark.parametrize("name", ["natural", "at", "mat"])
def test_label_smoothing_by_hand(name, study_data, load_study):
    model, y = Three().train(), torch.tensor([0, 1])
    loss = made_with(name, 0.3, study_data, load_study)(model, X, y, attacker())
    rows = (model.seen[-1].flatten(1) @ model.weight.T).tolist()
    assert loss.item() == pytest.approx(smoothed(rows, y.tolist(), 0.3), rel=1e-5)
    assert loss.item() != pytest.approx(smoothed(rows, y.tolist(), 0.0), rel=1e-3)
    plain = Three().train()
    loss_of(name, plain, x=X, y=y)
    assert torch.equal(plain.seen[-1], model.seen[-1])  # crafted against the plain label


@pytest.mark.parametrize("name", ["trades", "rst"])
def test_label_smoothing_of_trades_changes_only_the_clean_cross_entropy(
    name, study_data, load_study
):
    study_data["training"]["beta"] = 2.5
    model, y = Three().train(), torch.tensor([0, 1])
    loss = made_with(name, 0.3, study_data, load_study)(model, X, y, attacker())
    rows = (X.flatten(1) @ model.weight.T).tolist()
    difference = smoothed(rows, y.tolist(), 0.3) - smoothed(rows, y.tolist(), 0.0)
    plain = loss_of(name, Three().train(), beta=2.5, x=X, y=y)
    assert (loss - plain).item() == pytest.approx(difference, rel=1e-4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_label_smoothing_every_bit_is_as_before(name, study_data, load_study):
    made = made_with(name, 0.0, study_data, load_study)
    loss = made(linear(), X, Y, attacker())
    assert torch.equal(loss, loss_of(name, linear(), x=X, y=Y, beta=6.0))
