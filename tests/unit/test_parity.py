"""BCS, HYDRA and ADMM against NumPy code, which follows the description of a step.

The slow side has its own network, gradients, optimiser and rewiring. From the fast side it takes
the initial weights, signs and images, and the state of the random generator before the first step;
it then draws for itself, with the same calls in the same order.
"""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from robsparse.base.counts import keep_count
from robsparse.datasets import Part
from robsparse.method import bcs
from robsparse.sparsity.layers import prunable
from robsparse.study import loading
from robsparse.study.cells import Layout
from robsparse.training import loop
from robsparse.training.batches import Stored
from robsparse.training.checkpoints import StopRequest
from robsparse.training.loop import compute_gradients, train_cell, update
from robsparse.training.resuming import RunState
from robsparse.training.session import prepare_session

STRIDES = (1, 2, 2)
SPARSITY, BN_EPS, BN_MOMENTUM = 0.5, 1e-5, 0.1


# ---------------------------------------------------------------- a network in NumPy


def conv(x, w, stride):
    """3x3 convolution with one pixel of zeros around the image."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    side = -(-x.shape[2] // stride)
    out = np.zeros((len(x), len(w), side, side))
    for i in range(side):
        for j in range(side):
            patch = padded[:, :, i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[:, :, i, j] = np.einsum("nchw,ochw->no", patch, w)
    return out


def conv_gradients(x, w, stride, upstream):
    """Gradients of the input and of the weights."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    d_padded, d_w = np.zeros_like(padded), np.zeros_like(w)
    for i in range(upstream.shape[2]):
        for j in range(upstream.shape[3]):
            rows, columns = slice(i * stride, i * stride + 3), slice(j * stride, j * stride + 3)
            d_w += np.einsum("no,nchw->ochw", upstream[:, :, i, j], padded[:, :, rows, columns])
            d_padded[:, :, rows, columns] += np.einsum("no,ochw->nchw", upstream[:, :, i, j], w)
    return d_padded[:, :, 1:-1, 1:-1], d_w


class SlowNet:
    """Three convolutions with batch norm and ReLU, and a linear layer. All values are in a dict."""

    def __init__(self, model, own):
        """`own`: the trained values of the four layers, by name, for example scores."""
        self.p = {name: value.detach().numpy().copy() for name, value in own.items()}
        norms = [m for m in model if isinstance(m, torch.nn.BatchNorm2d)]
        for i, norm in enumerate(norms):
            self.p |= {f"gamma{i}": norm.weight.detach().numpy().copy()}
            self.p |= {f"beta{i}": norm.bias.detach().numpy().copy()}
        self.p["bias"] = model[-1].bias.detach().numpy().copy()
        self.running = [
            [norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()] for norm in norms
        ]
        self.velocity = {name: np.zeros_like(value) for name, value in self.p.items()}

    def weight(self, layer):
        """Return the weights of the forward pass."""
        return self.p[f"w{layer}"]

    def gradients(self, x, y):
        """Return the gradient of the mean cross entropy, and update running statistics."""
        kept = []
        for layer, stride in enumerate(STRIDES):
            z = conv(x, self.weight(layer), stride)
            mean, var = z.mean(axis=(0, 2, 3)), z.var(axis=(0, 2, 3))
            count = z.size // z.shape[1]
            old_mean, old_var = self.running[layer]
            # PyTorch stores the unbiased variance.
            self.running[layer] = [
                (1 - BN_MOMENTUM) * old_mean + BN_MOMENTUM * mean,
                (1 - BN_MOMENTUM) * old_var + BN_MOMENTUM * var * count / (count - 1),
            ]
            std = np.sqrt(var + BN_EPS)[:, None, None]
            normal = (z - mean[:, None, None]) / std
            gamma = self.p[f"gamma{layer}"][:, None, None]
            out = gamma * normal + self.p[f"beta{layer}"][:, None, None]
            kept.append((x, normal, std, out > 0))
            x = np.maximum(out, 0)
        flat = x.reshape(len(x), -1)
        logits = flat @ self.weight(3).T + self.p["bias"]
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        d_logits = exp / exp.sum(axis=1, keepdims=True)
        d_logits[np.arange(len(y)), y] -= 1
        d_logits /= len(y)
        found = {"bias": d_logits.sum(axis=0), "w3": d_logits.T @ flat}
        upstream = (d_logits @ self.weight(3)).reshape(x.shape)
        for layer in (2, 1, 0):
            x, normal, std, positive = kept[layer]
            upstream = upstream * positive
            found[f"gamma{layer}"] = (upstream * normal).sum(axis=(0, 2, 3))
            found[f"beta{layer}"] = upstream.sum(axis=(0, 2, 3))
            d_normal = upstream * self.p[f"gamma{layer}"][:, None, None]
            axes = {"axis": (0, 2, 3), "keepdims": True}
            d_z = d_normal - d_normal.mean(**axes) - normal * (d_normal * normal).mean(**axes)
            upstream, found[f"w{layer}"] = conv_gradients(
                x, self.weight(layer), STRIDES[layer], d_z / std
            )
        return found

    def image_gradient(self, x, y):
        """Gradient of the summed cross entropy with respect to the images, in eval mode."""
        kept = []
        for layer, stride in enumerate(STRIDES):
            mean, var = self.running[layer]
            scale = (self.p[f"gamma{layer}"] / np.sqrt(var + BN_EPS))[:, None, None]
            z = conv(x, self.weight(layer), stride)
            out = (z - mean[:, None, None]) * scale + self.p[f"beta{layer}"][:, None, None]
            kept.append((x, scale, out > 0))
            x = np.maximum(out, 0)
        logits = x.reshape(len(x), -1) @ self.weight(3).T + self.p["bias"]
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        d_logits = exp / exp.sum(axis=1, keepdims=True)
        d_logits[np.arange(len(y)), y] -= 1
        upstream = (d_logits @ self.weight(3)).reshape(x.shape)
        for layer in (2, 1, 0):
            x, scale, positive = kept[layer]
            d_z = upstream * positive * scale
            upstream, _ = conv_gradients(x, self.weight(layer), STRIDES[layer], d_z)
        return upstream

    def step_gradients(self, x, y, attack, clean_passes):
        """Gradients of one step; `clean_passes`: as in the Fit of a stage.

        attack: None for the loss of clean images, or eps, step size, steps and generator of PGD.
        """
        seen = x
        if clean_passes > 0:
            self.gradients(x, y)
        if attack is not None:
            draws = torch.rand(x.shape, generator=attack.generator, dtype=torch.float64).numpy()
            low, high = np.maximum(x - attack.eps, 0), np.minimum(x + attack.eps, 1)
            seen = np.clip(x + attack.eps * (2 * draws - 1), 0, 1)
            for _ in range(attack.steps):
                moved = seen + attack.step_size * np.sign(self.image_gradient(seen, y))
                seen = np.clip(moved, low, high)
        found = self.gradients(seen, y)
        if clean_passes > 1:
            self.gradients(x, y)
        return found

    def sgd(self, names, gradients, lr, decay):
        """SGD with momentum 0.9. Weight decay is added to the gradient."""
        for name in names:
            gradient = gradients[name] + decay * self.p[name]
            self.velocity[name] = 0.9 * self.velocity[name] + gradient
            self.p[name] = self.p[name] - lr * self.velocity[name]


def norms_and_bias(net):
    return ["bias", *(name for name in net.p if name.startswith(("gamma", "beta")))]


def same_norms(model, net):
    """Return pairs of the batch norm values of both sides."""
    norms = [m for m in model if isinstance(m, torch.nn.BatchNorm2d)]
    pairs = [(model[-1].bias, net.p["bias"])]
    for i, norm in enumerate(norms):
        pairs += [(norm.weight, net.p[f"gamma{i}"]), (norm.bias, net.p[f"beta{i}"])]
        pairs += zip((norm.running_mean, norm.running_var), net.running[i], strict=True)
    return pairs


class Comparison:
    """A slow side for each stage, by name. It makes the same steps as the real loop."""

    def __init__(self, sides):
        self.sides, self.seen = sides, {}

    def gradients(self, run, stage, objective, attacker, batch):
        """The real gradients, and a step of the slow side."""
        if stage.name not in self.seen:
            slow = self.sides[stage.name](run, stage)
            self.seen[stage.name] = SimpleNamespace(slow=slow, steps=0, worst=0.0)
        x_NCHW, y_N = batch
        self.seen[stage.name].slow.step(x_NCHW.numpy(), y_N.numpy(), run.lr)
        return compute_gradients(run, stage, objective, attacker, batch)

    def update(self, run, stage):
        """The real update. Stores the largest difference of both sides."""
        update(run, stage)
        seen = self.seen[stage.name]
        seen.steps += 1
        pairs = seen.slow.pairs(run.model)
        worst = max(np.abs(a.detach().numpy() - b).max() for a, b in pairs)
        seen.worst = max(seen.worst, worst)


def compared(study, cell, layout, sides):
    """Train a cell in double precision, with the slow sides of its stages.

    Returns the slow sides by stage, and the record of the training.
    """
    session = prepare_session(study, cell, layout, torch.device("cpu"))
    session.run.model.double()
    session.run.slow_attack = None
    if cell.objective == "at":
        crafting, generator = session.attacker.crafting, torch.Generator()
        generator.set_state(session.attacker.generator.get_state())
        session.run.slow_attack = SimpleNamespace(
            eps=session.attacker.eps,
            step_size=crafting.step_size,
            steps=crafting.steps,
            generator=generator,
        )
    x_NCHW, y_N = session.batches.train[:]
    session.batches.train = Stored(x_NCHW.double(), y_N, None)
    held = session.held_out
    session = replace(session, held_out=Part(held.x_NCHW[:20].double(), held.y_N[:20]))
    comparison, state = Comparison(sides), RunState(session)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compute_gradients", comparison.gradients)
        patch.setattr(loop, "update", comparison.update)
        loop.train(session, state, StopRequest())
    return comparison.seen, state.record


# ---------------------------------------------------------------- BCS


class SignedNet(SlowNet):
    """Weights are sign * theta if theta is positive, and 0 otherwise."""

    def __init__(self, model):
        layers = bcs.signed_layers(model)
        self.sign = [layer.sign.numpy().astype(float) for layer in layers]
        super().__init__(model, {f"theta{i}": theta for i, theta in enumerate(bcs.thetas(model))})

    def weight(self, layer):
        theta = self.p[f"theta{layer}"]
        return np.where(theta > 0, self.sign[layer] * theta, 0.0)

    def gradients(self, x, y):
        found = super().gradients(x, y)
        for layer in range(4):
            active = self.p[f"theta{layer}"] > 0
            found[f"theta{layer}"] = np.where(active, self.sign[layer] * found[f"w{layer}"], 0.0)
        return found


class Places:
    """All theta of the slow side. Positions count through all layers."""

    def __init__(self, net, pattern):
        self.net, self.pattern = net, pattern
        self.sizes = [net.p[f"theta{i}"].size for i in range(4)]
        self.starts = [sum(self.sizes[:i]) for i in range(4)]
        self.active = self.positive()

    def find(self, place, of):
        """Flat view of one layer's array and the index in it."""
        layer = max(i for i in range(4) if self.starts[i] <= place)
        return of[f"theta{layer}"].reshape(-1), place - self.starts[layer]

    def __getitem__(self, place):
        values, index = self.find(place, self.net.p)
        return values[index]

    def __setitem__(self, place, value):
        values, index = self.find(place, self.net.p)
        values[index] = value

    def positive(self):
        return [place for place in range(sum(self.sizes)) if self[place] > 0]

    def group(self, place):
        """Return the positions of a group: neighbours in the reduction of channels-last images."""
        layer = max(i for i in range(4) if self.starts[i] <= place)
        shape, size = self.net.p[f"theta{layer}"].shape, int(self.pattern.split(":")[1])
        out, channel, *tap = np.unravel_index(place - self.starts[layer], shape)
        channels = [c for c in range(shape[1]) if c // size == channel // size]
        return [
            self.starts[layer] + int(np.ravel_multi_index((out, c, *tap), shape)) for c in channels
        ]

    def fits(self, place, others=()):
        """Whether a dormant position can be active besides the active ones and `others`."""
        if place in others or self[place] > 0:
            return False
        if self.pattern is None:
            return True
        active = [p for p in self.group(place) if self[p] > 0 or p in others]
        return len(active) < int(self.pattern.split(":")[0])

    def open(self, layer):
        start = self.starts[layer]
        return [p for p in range(start, start + self.sizes[layer]) if self.fits(p)]


def slow_layer(share, chances):
    """Return the layer for a share of the sum of all chances."""
    at, passed = share * sum(chances), 0
    for layer, chance in enumerate(chances):
        passed += chance
        if at < passed:
            return layer
    raise AssertionError("a share below 1 falls into some layer")


def slow_draw(places, count, chances, generator):
    """Draw open positions: eight tries in each of three rounds, then from a list."""
    shares = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    layers, found = [slow_layer(share, chances) for share in shares], [None] * count
    for _ in range(3):
        open_ones = [i for i, place in enumerate(found) if place is None]
        if not open_ones:
            return found
        tries = torch.rand(len(open_ones), 8, generator=generator, dtype=torch.float64).tolist()
        claimed = []
        for i, shares in zip(open_ones, tries, strict=True):
            size, start = places.sizes[layers[i]], places.starts[layers[i]]
            fitting = [p for p in (start + int(u * size) for u in shares) if places.fits(p)]
            if fitting and places.fits(fitting[0], claimed):
                found[i] = fitting[0]
                claimed.append(fitting[0])
        for place in claimed:
            places[place] = 1e-12
    chances = list(chances)
    for layer in range(4):
        open_ones = [i for i, p in enumerate(found) if p is None and layers[i] == layer]
        if open_ones:
            listed = places.open(layer)
            waiting = list(open_ones)
            for k in torch.randperm(len(listed), generator=generator).tolist():
                if waiting and places.fits(listed[k]):
                    found[waiting.pop(0)] = listed[k]
                    places[listed[k]] = 1e-12
            if not places.open(layer):
                chances[layer] = 0
    open_ones = [i for i, p in enumerate(found) if p is None]
    if open_ones:
        again = slow_draw(places, len(open_ones), chances, generator)
        for i, place in zip(open_ones, again, strict=True):
            found[i] = place
    return found


def slow_step(net, places, x, y, generator, *, lr, decay, params):
    """One step of BCS in the order of the authors' code. Return the number of regrowths."""
    gradients = net.gradients(x, y)
    if params.waking == "drift":
        places.active = places.positive()
    masks = [net.p[f"theta{i}"] > 0 for i in range(4)]
    for name in net.p:
        net.velocity[name] = 0.9 * net.velocity[name] - lr * gradients[name]
        net.p[name] = (1 - decay) * net.p[name] + net.velocity[name]
    scale = lr * params.noise_scale
    if params.temperature is not None:
        scale = np.sqrt(2 * lr * params.temperature)
    noise = torch.randn(len(places.active), generator=generator).double().numpy()
    for place, own in zip(places.active, noise, strict=True):
        places[place] += scale * own
    thetas = [net.p[f"theta{i}"] for i in range(4)]
    if params.waking == "drawn":
        for theta, mask in zip(thetas, masks, strict=True):
            theta[~mask & (theta > 0)] = 0.0
    survives = [places[place] > 0 for place in places.active]
    room = [len(places.open(layer)) for layer in range(4)]
    missing = keep_count(sum(places.sizes), SPARSITY) - len(places.positive())
    chances = places.sizes if params.regrowth == "size" else room
    drawn = slow_draw(places, missing, chances, generator) if missing > 0 else []
    for place in drawn if params.momentum == "reset" else []:
        velocity, index = places.find(place, net.velocity)
        velocity[index] = 0.0
    if len(drawn) == survives.count(False):  # each one replaces a pruned connection
        new = iter(drawn)
        places.active = [
            p if survived else next(new)
            for p, survived in zip(places.active, survives, strict=True)
        ]
    else:
        places.active = [
            p for p, survived in zip(places.active, survives, strict=True) if survived
        ] + drawn
    return len(drawn)


class SlowSampling:
    """The sampler, with a copy of the generator."""

    def __init__(self, run, stage):
        self.run, self.stage, self.net, self.regrown = run, stage, SignedNet(run.model), 0
        self.places = Places(self.net, stage.params.pattern)
        self.generator = torch.Generator()
        self.generator.set_state(run.generator.get_state())

    def step(self, x, y, lr):
        decay = self.stage.fit.weight_decay * self.run.lr_factor
        options = {"lr": lr, "decay": decay, "params": self.stage.params}
        self.regrown += slow_step(self.net, self.places, x, y, self.generator, **options)

    def pairs(self, model):
        pairs = same_norms(model, self.net)
        for i, theta in enumerate(bcs.thetas(model)):
            slow = self.net.p[f"theta{i}"]
            assert np.array_equal(theta.detach().numpy() > 0, slow > 0), f"active sets of layer {i}"
            pairs.append((theta, slow))
        return pairs


VARIANTS = {
    "strict": {},
    "authors": {"init": "authors", "waking": "drift"},
    "momentum reset": {"init": "erk", "momentum": "reset"},
    "temperature": {"init": "uniform", "temperature": 1e-6},
    "by dormant positions": {"regrowth": "dormant"},
    "noise that kills and wakes": {"init": "authors", "waking": "drift", "noise_scale": 0.05},
    "noise that only kills": {"noise_scale": 0.05},
    "2:4": {"noise_scale": 0.05, "pattern": "2:4"},
    "2:4 by open positions": {"regrowth": "dormant", "noise_scale": 0.05, "pattern": "2:4"},
    "3:5": {"init": "erk", "noise_scale": 0.05, "pattern": "3:5"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_seventy_two_steps_equal_the_slow_side(variant, study_data, load_study, tmp_path):
    study_data["grid"] |= {"objectives": ["natural"], "methods": ["bcs"], "sparsities": [SPARSITY]}
    study_data["datasets"]["digits"] |= {"validation_examples": 800, "test_examples": 800}
    study_data["training"] |= {"batch_size": 32, "collapse_after": 0}
    study_data["archs"]["small_cnn"]["width"] = 3
    study_data["methods"]["bcs"] = {"train": {"epochs": 12, "weight_decay": 5e-3}}
    study_data["methods"]["bcs"] |= VARIANTS[variant]
    study: loading.Study = load_study(study_data)
    sides, record = compared(study, study.cells()[0], Layout(tmp_path), {"train": SlowSampling})
    seen = sides["train"]
    lr = [point["lr"] for point in record.curve]
    assert [round(x, 9) for x in (lr[0], lr[6], lr[9])] == [0.1, 0.01, 0.001]
    found = f"{seen.steps} steps, {seen.slow.regrown} regrown"
    print(f"{variant}: {found}, largest difference {seen.worst:.1e}")
    assert seen.steps == 72
    assert seen.slow.regrown > 500
    assert seen.worst < 1e-10


# ---------------------------------------------------------------- HYDRA and ADMM


def weights_of(model):
    return {f"w{i}": module.weight for i, module in enumerate(prunable(model).values())}


def largest(values, share, pattern=None):
    """1 where a value is among the largest of its layer, by sorting.

    With a pattern, a value is skipped if N larger ones of its group are kept.
    """
    keep = values.size - int(values.size * share + 1e-9)
    most, size = map(int, pattern.split(":")) if pattern else (values.size, values.size)
    mask, kept = np.zeros(values.shape), Counter()
    for place in np.argsort(-np.abs(values), axis=None):
        out, channel, *tap = index = np.unravel_index(place, values.shape)
        group = (out, channel // size, *tap)
        if sum(kept.values()) < keep and kept[group] < most:
            mask[index] = 1.0
            kept[group] += 1
    return mask


class SlowScores:
    """The pruning of HYDRA: only scores and batch norm are trained."""

    pattern = None

    def __init__(self, run, stage):
        self.decay, net = stage.fit.weight_decay, None
        self.attack, self.clean_passes = run.slow_attack, stage.fit.clean_passes
        raw = [m.parametrizations.weight.original for m in prunable(run.model).values()]
        self.raw = [weight.detach().numpy().copy() for weight in raw]
        self.start = {
            f"score{i}": np.sqrt(6 / w[0].size) * w / np.abs(w).max()
            for i, w in enumerate(self.raw)
        }
        net = SlowNet(run.model, {n: torch.from_numpy(v) for n, v in self.start.items()})
        net.weight = lambda i: self.raw[i] * largest(net.p[f"score{i}"], SPARSITY, self.pattern)
        self.net = net

    def step(self, x, y, lr):
        net = self.net
        found = net.step_gradients(x, y, self.attack, self.clean_passes)
        for i, raw in enumerate(self.raw):
            found[f"score{i}"] = found[f"w{i}"] * raw * np.sign(net.p[f"score{i}"])
        trained = [name for name in net.p if name != "bias"]
        net.sgd(trained, found, lr, self.decay)

    def pairs(self, model):
        layers = [m.parametrizations.weight for m in prunable(model).values()]
        pairs = same_norms(model, self.net)
        pairs += [(layer[0].score, self.net.p[f"score{i}"]) for i, layer in enumerate(layers)]
        return pairs + [(layer.original, self.raw[i]) for i, layer in enumerate(layers)]


class SlowMasked:
    """Training with a fixed mask of the initially largest weights of each layer."""

    pattern = None

    def __init__(self, run, stage):
        self.decay = stage.fit.weight_decay
        self.attack, self.clean_passes = run.slow_attack, stage.fit.clean_passes
        self.net = SlowNet(run.model, weights_of(run.model))
        self.masks = [largest(self.net.p[f"w{i}"], SPARSITY, self.pattern) for i in range(4)]

    def step(self, x, y, lr):
        found = self.net.step_gradients(x, y, self.attack, self.clean_passes)
        for i, mask in enumerate(self.masks):
            found[f"w{i}"] = found[f"w{i}"] * mask
        self.net.sgd(list(self.net.p), found, lr, self.decay)

    def pairs(self, model):
        pairs = same_norms(model, self.net)
        for i, module in enumerate(prunable(model).values()):
            pairs.append((module.weight, self.net.p[f"w{i}"] * self.masks[i]))
        return pairs


class SlowScores24(SlowScores):
    pattern = "2:4"


class SlowMasked24(SlowMasked):
    pattern = "2:4"


class SlowAdmm:
    """All weights move towards their projection. Z, U and rho change every second epoch."""

    def __init__(self, run, stage):
        self.decay, self.rho, self.updates, self.done = stage.fit.weight_decay, 0.02, 0, 0
        self.live_dual = stage.params.dual_gradient == "authors"
        self.net = SlowNet(run.model, weights_of(run.model))
        self.steps_per_epoch = run.steps // stage.fit.epochs
        self.Z = [self.net.p[f"w{i}"] * largest(self.net.p[f"w{i}"], SPARSITY) for i in range(4)]
        self.U = [np.zeros_like(z) for z in self.Z]

    def step(self, x, y, lr):
        net = self.net
        if self.done and self.done % (2 * self.steps_per_epoch) == 0:
            for i in range(4):
                w = net.p[f"w{i}"]
                self.Z[i] = (w + self.U[i]) * largest(w + self.U[i], SPARSITY)
                self.U[i] = self.U[i] + w - self.Z[i]
            self.rho *= 1.3
            self.updates += 1
        found = net.gradients(x, y)
        # The U of the authors contains the current weights once for each of its updates.
        times = 1 + self.live_dual * self.updates
        for i in range(4):
            gap = net.p[f"w{i}"] - self.Z[i] + self.U[i]
            found[f"w{i}"] = found[f"w{i}"] + times * self.rho * gap
        net.sgd(list(net.p), found, lr, self.decay)
        self.done += 1

    def pairs(self, model):
        modules = prunable(model).values()
        return same_norms(model, self.net) + [
            (module.weight, self.net.p[f"w{i}"]) for i, module in enumerate(modules)
        ]


BASELINES = {
    "hydra": {
        "params": {"prune": {"epochs": 8}, "finetune": {"epochs": 2, "lr": 0.05}},
        "sides": {"prune": SlowScores, "finetune": SlowMasked},
    },
    "admm": {
        "params": {
            "admm": {"epochs": 8, "lr": 0.05},
            "update_every": 2,
            "rho": 0.02,
            "retrain": {"epochs": 2, "lr": 0.05},
        },
        "sides": {"admm": SlowAdmm, "retrain": SlowMasked},
    },
    "lwm": {"params": {"finetune": {"epochs": 8}}, "sides": {"finetune": SlowMasked}},
}
BASELINES |= {
    "hydra, passes of its authors": {
        "method": "hydra",
        "objective": "at",
        "params": {
            "prune": {"epochs": 4, "clean_passes": 2},
            "finetune": {"epochs": 2, "lr": 0.05, "clean_passes": 2},
        },
        "sides": BASELINES["hydra"]["sides"],
    },
    "admm, dual gradient of its authors": {
        "method": "admm",
        "params": BASELINES["admm"]["params"] | {"dual_gradient": "authors"},
        "sides": BASELINES["admm"]["sides"],
    },
    "hydra, 2:4": {
        "method": "hydra",
        "params": BASELINES["hydra"]["params"] | {"pattern": "2:4"},
        "sides": {"prune": SlowScores24, "finetune": SlowMasked24},
    },
    "lwm, 2:4": {
        "method": "lwm",
        "params": BASELINES["lwm"]["params"] | {"pattern": "2:4"},
        "sides": {"finetune": SlowMasked24},
    },
}


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_equal_their_slow_side(name, study_data, load_study, tmp_path):
    case = BASELINES[name]
    method, objective = case.get("method", name), case.get("objective", "natural")
    study_data["grid"] |= {"objectives": [objective], "methods": [method], "sparsities": [SPARSITY]}
    study_data["datasets"]["digits"] |= {"validation_examples": 800, "test_examples": 800}
    study_data["training"] |= {"batch_size": 32, "collapse_after": 0}
    study_data["archs"]["small_cnn"]["width"] = 3
    study_data["methods"][method] = case["params"]
    study = load_study(study_data)
    dense, cell = study.cells()
    layout = Layout(tmp_path)
    train_cell(study, dense, layout, device="cpu")
    seen, _ = compared(study, cell, layout, case["sides"])
    for stage, side in seen.items():
        print(f"{name} {stage}: {side.steps} steps, largest difference {side.worst:.1e}")
        assert side.steps == 6 * study.planned[cell].params.model_dump()[stage]["epochs"]
        assert side.worst < 1e-10
    assert set(seen) == set(case["sides"])
    if method == "admm":
        assert seen["admm"].slow.updates == 3
    if method == "hydra":
        slow = seen["prune"].slow
        moved = [
            (
                largest(slow.start[f"score{i}"], SPARSITY, slow.pattern)
                != largest(slow.net.p[f"score{i}"], SPARSITY, slow.pattern)
            )
            for i in range(4)
        ]
        assert sum(m.sum() for m in moved) > 0  # the scores chose other weights than LWM
