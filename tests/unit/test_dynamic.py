"""Dynamic sparse training and other baselines, on small networks, by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from robsparse.base.counts import keep_count
from robsparse.base.errors import TrainingError
from robsparse.baselines import (
    admm,
    flyingbird,
    flyingbird_plus,
    global_magnitude,
    gmp,
    harp,
    hydra,
    rigl,
    set,
    snip,
    static_random,
    template,
)
from robsparse.sparsity.budgets import erk_keep_counts, layer_keep_counts, quota_keep_counts
from robsparse.sparsity.layers import nonzero_count, prunable, weight_count
from robsparse.sparsity.masks import global_masks, random_masks
from robsparse.sparsity.scores import scaled_scores
from robsparse.training.dynamic import NEW_WEIGHT, masked_layers, set_masks
from robsparse.training.stages import Run, remaining_weights

NETS = [
    lambda: nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)),
    lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)),
]


def run_of(model, sparsity, steps=100):
    run = Run(model, sparsity, torch.Generator().manual_seed(0), steps=steps)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return run


def started(stage, sparsity=0.5, net=0, steps=100):
    """Return the stage and its run before the first step."""
    torch.manual_seed(1)
    run = run_of(NETS[net](), sparsity, steps)
    stage.before_fit(run)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    return stage, run


def step(stage, run, at, gradient=None):
    """One training step; `gradient(name, weight)` gives the gradients of all weights."""
    run.step = at
    run.optimizer.zero_grad()
    x = torch.randn(8, *((12,) if isinstance(run.model[0], nn.Linear) else (2, 4, 4)))
    run.model(x).square().mean().backward()
    if gradient:
        for name, weight, _ in masked_layers(run.model):
            weight.grad = gradient(name, weight)
    stage.before_step(run)
    run.optimizer.step()
    stage.after_step(run)


def masks(run):
    return {name: layer.mask.clone() for name, _, layer in masked_layers(run.model)}


def always(**changes):
    return lambda stage: stage.params.model_copy(update={"update_every": 1} | changes)


# ---------------------------------------------------------------- counts of layers


@pytest.mark.parametrize("net", [0, 1])
@given(sparsity=st.integers(1, 99).map(lambda n: n / 100))
def test_quotas_meet_the_budget_and_small_layers_are_denser(net, sparsity):
    model = NETS[net]()
    counts = quota_keep_counts(model, sparsity)
    sizes = {name: module.weight.numel() for name, module in prunable(model).items()}
    assert sum(counts.values()) == keep_count(sum(sizes.values()), sparsity)
    assert all(0 <= counts[name] <= size for name, size in sizes.items())
    small, large = sorted(sizes, key=sizes.get)
    assert counts[small] / sizes[small] >= counts[large] / sizes[large] - 1 / sizes[small]


def test_quotas_by_hand():
    # 1 / (1 + F n) with n = 45 and 108: F = 1/45 gives densities 1/2 and 1/3.4
    model = NETS[0]()
    total = 45 / 2 + 108 / (1 + 108 / 45)
    counts = quota_keep_counts(model, round(1 - total / 153, 4))
    assert sorted(counts.values()) == sorted([round(45 / 2 - 1e-9), 32])


@given(sparsity=st.integers(1, 99).map(lambda n: n / 100), seed=st.integers(0, 99))
def test_random_masks_have_the_given_counts(sparsity, seed):
    model = NETS[1]()
    counts = erk_keep_counts(model, sparsity)
    found = random_masks(model, counts, torch.Generator().manual_seed(seed))
    assert {name: int(mask.sum()) for name, mask in found.items()} == counts


def test_global_masks_keep_the_largest_of_all_layers():
    scores = {"a": torch.tensor([[5.0, 1.0]]), "b": torch.tensor([4.0, 3.0, 2.0])}
    found = global_masks(scores, 3)
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "a": [[True, False]],
        "b": [True, True, False],
    }


# ---------------------------------------------------------------- all dynamic methods


DYNAMIC = {
    "set": lambda: set.SetStage(set.Params()),
    "rigl": lambda: rigl.RiglStage(rigl.Params(update_every=1)),
    "flyingbird": lambda: flyingbird.FlyingBirdStage(
        flyingbird.Params(update_every=1, late_update_every=1)
    ),
    "flyingbird by gradient": lambda: flyingbird.FlyingBirdStage(
        flyingbird.Params(update_every=1, late_update_every=1, init="erk", growth="gradient")
    ),
    "flyingbird_plus": lambda: flyingbird_plus.FlyingBirdPlusStage(
        flyingbird_plus.Params(update_every=1, late_update_every=1)
    ),  # without validations it is Flying Bird
}


@pytest.mark.parametrize("net", [0, 1])
@pytest.mark.parametrize("name", DYNAMIC)
def test_the_number_of_active_weights_of_each_layer_never_changes(name, net):
    stage, run = started(DYNAMIC[name](), 0.7, net)
    stage.fit = stage.fit.model_copy(update={"epochs": 50})  # two steps an epoch
    before = {layer: int(mask.sum()) for layer, mask in masks(run).items()}
    moved = 0
    for at in range(60):
        run.epoch = at // 2
        old = masks(run)
        step(stage, run, at)
        now = masks(run)
        assert {layer: int(mask.sum()) for layer, mask in now.items()} == before
        moved += sum(int((old[layer] != mask).sum()) for layer, mask in now.items())
        for _, weight, layer in masked_layers(run.model):
            assert (weight[~layer.mask] == 0).all()
        assert (
            nonzero_count(run.model)
            == stage.active_weights(run)
            == keep_count(weight_count(run.model), 0.7)
        )
    assert moved > 0
    log = run.connections.steps().to_pandas()
    assert log.pruned.sum() == log.regrown.sum() == moved / 2


@pytest.mark.parametrize("name", DYNAMIC)
def test_new_weights_have_a_tiny_value_and_no_momentum(name):
    stage, run = started(DYNAMIC[name]())
    stage.fit = stage.fit.model_copy(update={"epochs": 50})
    for at in range(2):
        step(stage, run, at)
    old = masks(run)
    step(stage, run, 2)
    for layer, weight, mask in masked_layers(run.model):
        new = mask.mask & ~old[layer]
        velocity = run.optimizer.state[weight]["momentum_buffer"]
        assert (weight[new] == NEW_WEIGHT).all()
        assert (velocity[new] == 0).all()
        assert (velocity[~mask.mask] == 0).all()


@pytest.mark.parametrize("name", ["rigl", "flyingbird", "flyingbird by gradient"])
def test_a_connection_that_is_dropped_and_grown_in_one_update_does_not_change(name):
    """As in the code of RigL and Flying Bird. A dense layer does not change."""
    stage, run = started(
        DYNAMIC[name](), 0.2
    )  # the Erdos-Renyi-Kernel shares make the last layer dense
    stage.fit = stage.fit.model_copy(update={"epochs": 50})
    active = {}
    for layer, weight, mask in masked_layers(run.model):
        velocity = torch.full_like(weight, 0.5) * mask.mask
        run.optimizer.state[weight]["momentum_buffer"] = velocity
        active[layer] = mask.mask.clone()
    run.optimizer.step = lambda: None  # only the update of the mask
    before = {n: w.detach().clone() for n, w, _ in masked_layers(run.model)}
    step(stage, run, 2, lambda _, weight: weight.detach().abs().neg().exp())
    for layer, weight, mask in masked_layers(run.model):
        still = active[layer] & mask.mask
        assert torch.equal(weight[still], before[layer][still])
        assert (run.optimizer.state[weight]["momentum_buffer"][still] == 0.5).all()
    assert name == "flyingbird" or any(mask.all() for mask in active.values())


def test_set_resets_a_connection_that_is_dropped_and_grown_in_one_update():
    """As in the code of SET. In a dense layer, the smallest weights are reset to 0."""
    stage, run = started(DYNAMIC["set"](), 0.2)
    stage.fit = stage.fit.model_copy(update={"epochs": 50})
    step(stage, run, 2)
    [dense] = [w for _, w, layer in masked_layers(run.model) if layer.mask.all()]
    assert (dense == NEW_WEIGHT).any()


def test_flying_bird_rounds_the_number_of_dropped_connections_up():
    stage, run = started(DYNAMIC["flyingbird"]())
    run.step, run.steps = 9, 40
    mask = torch.ones(3, 7, dtype=torch.bool)
    assert stage.fraction(run) * 21 == pytest.approx(9.0, abs=0.4)
    assert stage.dropped_count(run, mask) == math.ceil(stage.fraction(run) * 21)
    assert stage.dropped_count(run, mask) > stage.fraction(run) * 21


# ---------------------------------------------------------------- RigL


def test_rigl_drops_the_smallest_and_grows_where_the_gradient_is_largest():
    stage, run = started(rigl.RiglStage(rigl.Params(update_every=10, alpha=0.6, t_end=1.0)))
    gradients = {name: torch.randn_like(weight) for name, weight, _ in masked_layers(run.model)}
    before = {name: weight.detach().clone() for name, weight, _ in masked_layers(run.model)}
    old = masks(run)
    step(stage, run, 50, lambda name, weight: gradients[name].clone())
    for name, weight, layer in masked_layers(run.model):
        # at half of the training: alpha / 2 * (1 + 0) of the active weights
        count = int(0.6 / 2 * (1 + math.cos(math.pi * 0.5)) * int(old[name].sum()))
        active = [i for i, on in enumerate(old[name].flatten().tolist()) if on]
        size = before[name].abs().flatten().tolist()
        dropped = sorted(active, key=lambda i: size[i])[:count]
        kept = [i for i in active if i not in dropped]
        others = [i for i in range(weight.numel()) if i not in kept]
        score = gradients[name].abs().flatten().tolist()
        grown = sorted(others, key=lambda i: -score[i])[:count]
        assert layer.mask.flatten().nonzero().flatten().tolist() == sorted(kept + grown)
        # the update replaces the step, so the kept weights have not changed
        assert torch.equal(weight.flatten()[kept], before[name].flatten()[kept])


def test_rigl_stops_at_its_share_of_training():
    stage, run = started(rigl.RiglStage(rigl.Params(update_every=10, t_end=0.75)))
    run.step = 70
    assert stage.due(run)
    assert stage.fraction(run) < 0.01
    for run.step in (0, 65, 75, 80):
        assert not stage.due(run)


# ---------------------------------------------------------------- SET


def test_set_drops_by_sign_and_grows_at_random():
    stage, run = started(set.SetStage(set.Params(zeta=0.5)), 0.4)
    [(_, weight, layer), *_] = masked_layers(run.model)
    old, before = layer.mask.clone(), weight.detach().clone()
    dropped = {int(i) for i in stage.to_drop(run, weight, layer.mask)}
    for sign in (1, -1):
        own = old.flatten().nonzero().flatten().tolist()
        own = [i for i in own if sign * float(before.flatten()[i]) > 0]
        nearest = sorted(own, key=lambda i: abs(float(before.flatten()[i])))[: len(own) // 2]
        assert set_of(nearest) <= dropped
    one = stage.growth_scores(run, weight)
    assert not torch.equal(one, stage.growth_scores(run, weight))


def set_of(values):
    return {int(v) for v in values}


def test_set_updates_once_in_each_epoch_but_not_after_the_last():
    stage, run = started(set.SetStage(set.Params()), steps=60)
    stage.fit = stage.fit.model_copy(update={"epochs": 3})
    due = [at for run.step in range(60) for at in [run.step] if stage.due(run)]
    assert due == [20, 40]


# ---------------------------------------------------------------- Flying Bird


def test_flying_bird_updates_fewer_weights_and_later_less_often():
    params = flyingbird.Params(update_every=10, late_update_every=20)
    stage, run = started(flyingbird.FlyingBirdStage(params), steps=200)
    stage.fit = stage.fit.model_copy(update={"epochs": 4})
    due, shares = [], []
    for run.step in range(200):
        run.epoch = run.step // 50
        if stage.due(run):
            due.append(run.step + 1)
            shares.append(stage.fraction(run))
    # The authors' "epoch > epochs / 2": of four epochs, the last one.
    assert due == [*range(10, 151, 10), 160, 180]
    assert shares == sorted(shares, reverse=True)
    assert shares[9] == pytest.approx(0.005 + 0.495 * (1 + math.cos(math.pi / 2)) / 2)


# ---------------------------------------------------------------- Flying Bird+

FALLS, RISES, SAME = [5, 4, 3, 2, 1], [1, 2, 3, 4, 5], [1, 1, 1, 1, 1]


def plus(gaps, losses, epoch=60, net=0, sparsity=0.7, **params):
    """A stage of 100 epochs before an update, after validations with these gaps and losses."""
    params = {"update_every": 1, "late_update_every": 1, "init": "erk"} | params
    values = flyingbird_plus.Params(train={"epochs": 100}, **params)
    stage, run = started(flyingbird_plus.FlyingBirdPlusStage(values), sparsity, net)
    run.optimizer.step = lambda: None  # only the update of the mask
    run.epoch = epoch
    run.curve = [
        {"train_accuracy": 0.5 + 0.01 * gap, "val_robust": 0.5, "val_loss": loss}
        for gap, loss in zip(gaps, losses, strict=True)
    ]
    return stage, run


@pytest.mark.parametrize(
    ("gaps", "losses", "epoch", "prunes", "grows"),
    [
        (FALLS, FALLS, 60, False, False),
        (RISES, FALLS, 60, True, False),
        (FALLS, RISES, 60, False, True),
        (RISES, RISES, 60, True, True),
        (RISES, RISES, 50, True, True),  # from the 51st of 100 epochs on
        (RISES, RISES, 49, False, False),
        ([9, 1, 2, 3, 2, 1], [9, 1, 2, 3, 2, 1], 60, True, True),  # two of the last four
        ([1, 2, 3, 2, 1, 0], [1, 2, 3, 2, 1, 0], 60, False, False),  # one of the last four
        (SAME, SAME, 60, False, True),  # an equal gap did not rise; an equal loss did not fall
        ([1, 2], [1, 2], 60, True, True),
        ([1], [1], 60, False, False),
        ([], [], 60, False, False),
    ],
)
def test_flying_bird_plus_prunes_and_grows_more_while_it_overfits(
    gaps, losses, epoch, prunes, grows
):
    """Compared with lists: which weights are dropped, and which are grown by their gradient."""
    stage, run = plus(gaps, losses, epoch, growth="gradient", death_rate=0.9, growth_ratio=0.3)
    torch.manual_seed(3)
    gradients = {name: torch.randn_like(weight) for name, weight, _ in masked_layers(run.model)}
    weights = {n: w.detach().abs().flatten().tolist() for n, w, _ in masked_layers(run.model)}
    old = masks(run)
    step(stage, run, 20, lambda name, weight: gradients[name].clone())
    share = 0.005 + (0.9 - 0.005) * (1 + math.cos(math.pi * 21 / 100)) / 2
    for name, mask in masks(run).items():
        active = old[name].flatten().nonzero().flatten().tolist()
        usual = math.ceil(share * len(active))
        more = math.ceil(share * 0.4 * len(active)) if prunes else 0
        dropped = sorted(active, key=lambda i: weights[name][i])[: usual + more]
        free = [i for i in range(mask.numel()) if i not in active or i in dropped]
        score = gradients[name].abs().flatten().tolist()
        count = int(usual * 1.3) if grows else usual
        grown = sorted(free, key=lambda i: -score[i])[:count]
        expected = sorted({*active} - {*dropped} | {*grown})
        assert mask.flatten().nonzero().flatten().tolist() == expected
    if not (prunes and grows):
        changed = stage.active_weights(run) - keep_count(153, 0.7)
        assert (changed < 0, changed > 0) == (prunes, grows)
    log = run.connections.steps().to_pandas()
    assert log[log.step == 1].active.sum() == stage.active_weights(run)


def test_flying_bird_plus_has_the_numbers_of_the_authors_by_default():
    params = flyingbird_plus.Params()
    assert (params.compared, params.threshold, params.adapt_from) == (4, 0.5, 0.5)
    assert (params.prune_ratio, params.growth_ratio) == (0.4, 0.05)
    assert flyingbird.Params() == flyingbird.Params(
        **{key: getattr(params, key) for key in flyingbird.Params.model_fields}
    )


@pytest.mark.parametrize("net", [0, 1])
@pytest.mark.parametrize("growth", ["random", "gradient"])
def test_flying_bird_plus_never_empties_a_layer_and_leaves_dense_layers_alone(growth, net):
    stage, run = plus(RISES, FALLS, net=net, sparsity=0.2, growth=growth)
    before = {name: weight.detach().clone() for name, weight, _ in masked_layers(run.model)}
    dense = [name for name, mask in masks(run).items() if mask.all()]
    assert dense
    for at in range(99):
        step(stage, run, at)
    for name, weight, layer in masked_layers(run.model):
        assert layer.mask.any()
        assert (weight[~layer.mask] == 0).all()
        assert name not in dense or torch.equal(weight, before[name])
    run.curve[:] = [
        {"train_accuracy": 1 - i, "val_robust": 0.5, "val_loss": 1} for i in range(5)
    ]  # only growth, until nothing is masked
    for at in range(99):
        stage.params = stage.params.model_copy(update={"growth_ratio": 2.0})
        step(stage, run, at)
    assert stage.active_weights(run) == weight_count(run.model)


# ---------------------------------------------------------------- gradual magnitude pruning


def test_gradual_pruning_follows_the_cubic_and_ends_exact():
    params = gmp.Params(update_every=5, begin=0.1, end=0.5)
    stage, run = started(gmp.GradualStage(params), 0.9)
    sizes = {name: layer.mask.numel() for name, _, layer in masked_layers(run.model)}
    for at in range(60):
        step(stage, run, at)
        done = min(1, (at + 1 - 10) / 40)
        if at < 9:
            assert stage.active_weights(run) == weight_count(run.model)
        elif (at + 1) % 5 == 0:
            wanted = round(0.9 * (1 - (1 - done) ** 3), 10)
            active = {name: int(mask.sum()) for name, mask in masks(run).items()}
            assert active == {n: size - int(size * wanted + 1e-9) for n, size in sizes.items()}
        assert stage.selectable == (done == 1)
    assert stage.active_weights(run) == sum(layer_keep_counts(run.model, 0.9).values())


def test_gradual_pruning_drops_the_smallest_and_never_regrows_them():
    stage, run = started(gmp.GradualStage(gmp.Params(update_every=1, end=1.0)), 0.9)
    for at in range(100):
        old = masks(run)
        step(stage, run, at)
        for name, weight, layer in masked_layers(run.model):
            assert not (layer.mask & ~old[name]).any()
            gone = old[name] & ~layer.mask
            assert (weight[gone] == 0).all()


def test_gradual_pruning_requires_the_begin_before_the_end():
    with pytest.raises(ValueError, match="expected begin to be less than end"):
        gmp.Params(begin=0.6, end=0.5)


# ---------------------------------------------------------------- SNIP


def test_snip_keeps_the_largest_products_of_weight_and_gradient():
    stage, run = started(snip.SnipStage(snip.Params().train), 0.8)
    assert stage.active_weights(run) == weight_count(run.model)
    before = {n: w.detach().clone() for n, w, _ in masked_layers(run.model)}
    gradients = {n: torch.randn_like(w) for n, w, _ in masked_layers(run.model)}
    step(stage, run, 0, lambda name, weight: gradients[name].clone())
    products = [
        (abs(float(w * g)), name, i)
        for name in before
        for i, (w, g) in enumerate(
            zip(before[name].flatten(), gradients[name].flatten(), strict=True)
        )
    ]
    kept = {(name, i) for _, name, i in sorted(products, reverse=True)[: keep_count(153, 0.8)]}
    found = {
        (n, i) for n, m in masks(run).items() for i in m.flatten().nonzero().flatten().tolist()
    }
    assert found == kept
    chosen = masks(run)
    for at in range(1, 5):
        step(stage, run, at)
    assert all(torch.equal(mask, chosen[name]) for name, mask in masks(run).items())
    assert nonzero_count(run.model) == keep_count(153, 0.8)


# ---------------------------------------------------------------- fixed masks


def test_static_random_has_erdos_renyi_shares():
    run = run_of(NETS[1](), 0.8)
    found = static_random.masks(run)
    counts = erk_keep_counts(run.model, 0.8)
    assert {name: int(mask.sum()) for name, mask in found.items()} == counts


def test_global_magnitude_has_one_threshold():
    run = run_of(NETS[0](), 0.7)
    found = global_magnitude.masks(run)
    kept, gone = [], []
    for name, module in prunable(run.model).items():
        kept += module.weight.detach()[found[name]].abs().tolist()
        gone += module.weight.detach()[~found[name]].abs().tolist()
    assert len(kept) == keep_count(153, 0.7)
    assert min(kept) > max(gone)


def test_template_prunes_at_random():
    run = run_of(NETS[0](), 0.7)
    before = [module.weight.detach().clone() for module in prunable(run.model).values()]
    (stage,) = template.stages(template.Params())
    stage.before_fit(run)
    for module, weight in zip(prunable(run.model).values(), before, strict=True):
        active = module.weight != 0
        assert (
            int(active.sum())
            == layer_keep_counts(run.model, 0.7)[
                next(n for n, m in prunable(run.model).items() if m is module)
            ]
        )
        assert torch.equal(module.weight[active], weight[active])
        largest = weight.abs().flatten().topk(int(active.sum())).indices
        assert not active.flatten()[largest].all()


# ---------------------------------------------------------------- HARP


def pruning(sparsity=0.9, net=0, **params):
    torch.manual_seed(2)
    run = run_of(NETS[net](), sparsity)
    stage = harp.PruneStage(harp.Params(**params))
    stage.before_fit(run)
    return stage, run


def test_harp_starts_at_its_initial_density():
    _, run = pruning(initial_density=0.3)
    for module, mask in harp.rated(run.model):
        assert mask.share().item() == pytest.approx(0.3, abs=1e-4)
        size = module.weight.numel()
        kept = size - int((1 - mask.share().item()) * size)
        assert int(module.weight.count_nonzero()) == kept
    _, run = pruning(0.5, initial_density=0.01)  # not below alpha times the target
    for _, mask in harp.rated(run.model):
        assert mask.share().item() == pytest.approx(0.05, abs=1e-4)


def test_harp_finetunes_with_the_authors_learning_rate():
    finetune = harp.Params().finetune
    assert (finetune.lr, finetune.schedule, finetune.weight_decay) == (0.01, "cosine", 5e-4)


def test_harp_share_gets_the_sum_of_the_masks_gradient():
    _, run = pruning()
    module, mask = harp.rated(run.model)[0]
    upstream = torch.randn_like(module.weight)
    (module.weight * upstream).sum().backward()
    raw = module.parametrizations.weight.original.detach()
    inner = torch.sigmoid(mask.rate.detach())
    slope = (1 - mask.least) * inner * (1 - inner)
    expected = (raw * upstream).sum() * slope
    torch.testing.assert_close(mask.rate.grad, expected)
    torch.testing.assert_close(mask.score.grad, raw * upstream * mask.score.sign())


def test_harp_penalty_by_hand():
    stage, run = pruning(0.9, initial_density=0.3)
    # kept share 0.3 of all weights against a density of 0.1: excess 2
    assert stage.penalty(run).item() == pytest.approx(0.01 * 2, rel=1e-3)
    run.epoch = 3
    stage.before_epoch(run)
    assert stage.gamma == pytest.approx(0.04)
    for _, mask in harp.rated(run.model):
        mask.rate.data.fill_(-20.0)
    run.epoch = 4
    stage.before_epoch(run)  # epoch 3 ended at the target: its weight stays
    assert stage.gamma == pytest.approx(0.04)
    for _, mask in harp.rated(run.model):
        mask.rate.data.fill_(2.0)
    run.epoch = 5
    stage.before_epoch(run)
    assert stage.gamma == pytest.approx(0.04)


@pytest.mark.parametrize("net", [0, 1])
@given(
    sparsity=st.sampled_from([0.5, 0.8, 0.9, 0.95]),
    rates=st.tuples(st.floats(-6, 6), st.floats(-6, 6)),
)
def test_harp_ends_at_the_global_target_with_unequal_layers(net, sparsity, rates):
    stage, run = pruning(sparsity, net)
    for rate, (_, mask) in zip(rates, harp.rated(run.model), strict=True):
        mask.rate.data.fill_(rate)
    shares = [mask.share().item() for _, mask in harp.rated(run.model)]
    scores = [mask.score.abs() for _, mask in harp.rated(run.model)]
    stage.finalize(run)
    assert nonzero_count(run.model) == keep_count(weight_count(run.model), sparsity)
    densities = []
    for module, score in zip(prunable(run.model).values(), scores, strict=True):
        active = module.weight != 0
        densities.append(float(active.float().mean()))
        if 0 < int(active.sum()) < active.numel():
            assert score[active].min() >= score[~active].max()
    if abs(shares[0] - shares[1]) > 0.3 and max(densities) < 1:
        assert (densities[0] > densities[1]) == (shares[0] > shares[1])


@pytest.mark.parametrize(("excess", "settled"), [(0.0, True), (4e-5, True), (1e-3, False)])
def test_harp_penalty_stays_once_the_excess_rounds_to_zero_at_four_decimals(
    excess, settled, monkeypatch
):
    stage, run = pruning()
    monkeypatch.setattr(stage, "excess", lambda run: torch.tensor(excess))
    run.epoch = 1
    stage.before_epoch(run)
    assert stage.settled is settled


def test_harp_finetunes_the_weights_that_it_chose():
    stage, run = pruning(0.8)
    stage.finalize(run)
    chosen = remaining_weights(run)
    finetune = harp.stages(harp.Params())[1]
    finetune.before_fit(run)
    assert all(torch.equal(m.weight != 0, chosen[n]) for n, m in prunable(run.model).items())


def test_set_masks_also_masks_weights_and_momentum():
    stage, run = started(snip.SnipStage(snip.Params().train), 0.8)
    step(stage, run, 1)
    none = {name: torch.zeros_like(layer.mask) for name, _, layer in masked_layers(run.model)}
    set_masks(run, none)
    for _, weight, _ in masked_layers(run.model):
        assert not weight.any()
        assert not run.optimizer.state[weight]["momentum_buffer"].any()


# ---------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize("spoilt", ["weight", "gradient"])
@pytest.mark.parametrize("name", [*DYNAMIC, "snip", "gmp"])
def test_values_that_are_not_finite_are_never_ranked(name, spoilt):
    made = DYNAMIC | {
        "snip": lambda: snip.SnipStage(snip.Params().train),
        "gmp": lambda: gmp.GradualStage(gmp.Params(update_every=1)),
    }
    stage, run = started(made[name](), 0.5)
    stage.fit = stage.fit.model_copy(update={"epochs": 100})
    at = 0 if name == "snip" else 1
    if spoilt == "weight":
        for _, weight, layer in masked_layers(run.model):
            weight.data.view(-1)[int(layer.mask.flatten().nonzero()[0])] = math.nan

    def gradient(_, weight):
        return torch.full_like(weight, math.nan if spoilt == "gradient" else 0.0)

    def train():
        for offset in (0, 0, 1):  # a gradient that is not finite may change the weights first
            step(stage, run, at + offset, gradient)

    with pytest.raises(TrainingError, match="scores of weights are not finite"):
        train()


@pytest.mark.parametrize("projection", ["top_k", "percentile"])
def test_admm_projects_no_weights_that_are_not_finite(projection):
    weight = torch.tensor([1.0, math.nan, 2.0])
    with pytest.raises(TrainingError, match="1 of 3 scores"):
        admm.survivors(weight, 0.5, admm.Params(projection=projection))


@pytest.mark.parametrize("method", [hydra, harp])
def test_no_masks_are_computed_from_scores_that_are_not_finite(method):
    run = run_of(NETS[0](), 0.5)
    stage = method.stages(method.Params())[0]
    stage.before_fit(run)
    module = next(iter(prunable(run.model).values()))
    module.parametrizations.weight[0].score.data.view(-1)[0] = math.nan
    with pytest.raises(TrainingError, match="1 of 108 scores"):
        _ = module.weight


def test_a_layer_of_zeros_has_scores_of_zero():
    assert scaled_scores(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2
