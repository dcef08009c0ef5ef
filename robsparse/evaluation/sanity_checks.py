"""Sanity checks of an evaluation: signs that an attack fails although a network is not robust.

They run on every evaluated network. A result of a network that fails one is *potentially
unreliable*.

Sources: Athalye et al., ICML 2018, section 3.1 (signs of obfuscated gradients); Carlini et al., "On
evaluating adversarial robustness", 2019; the checks of AutoAttack (Croce and Hein, ICML 2020).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.datasets import Part
from robsparse.evaluation.attacks import Outcome
from robsparse.evaluation.cache import Cache, cache_basis, network_digest
from robsparse.evaluation.random_search import random_search
from robsparse.evaluation.tally import in_batches
from robsparse.schema.evaluation import Evaluation
from robsparse.schema.threat import Threat

HUGE = 1.0  # an L-inf eps at which every image can become any other image
HUGE_STEPS = 20
STEPS = (10, 50, 200)
RANDOM = 1e-4  # the largest difference of logits between two passes that counts as rounding
ZEROS = 0.05  # the largest allowed share of images without a gradient
_FAR = 1e9  # replaces an infinite difference, because a record has only finite numbers
GAP = 0.02  # the largest allowed share of additional images that a stronger attack breaks


@dataclass(frozen=True)
class Findings:
    """The results of the sanity checks, and the reasons why a network is potentially unreliable.

    numbers: `examined` (images), `randomness` (the largest difference of logits between two
        passes), `probabilities` (1 if the outputs are probabilities), `nan_logits` (images), and
        shares of the examined images: `correct`; `zero_gradient` (of the correct images);
        `chance` (the largest class); `huge_eps` (still correct under PGD at eps 1); `pgd_10`,
        `pgd_50`, `pgd_200` (still correct under PGD with so many steps); `black_box_only` (broken
        by random search, but not by PGD with 200 steps).
    """

    numbers: dict[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    def potentially_unreliable(self, outcomes: list[Outcome]) -> str:
        """Return all reasons: those of the sanity checks, and the warnings of the attacks."""
        warnings = [text for outcome in outcomes for text in outcome.warnings]
        return "; ".join(dict.fromkeys([*self.reasons, *warnings]))


def passes(settings: Evaluation) -> tuple[int, int]:
    """Return the passes forward and backward, and forward only, over an image that survives."""
    return HUGE_STEPS + sum(STEPS), settings.sanity_checks.queries


def examine(
    model: nn.Module,
    examples: Part,
    settings: Evaluation,
    threat: Threat,
    device: torch.device,
    *,
    folder: Path | None = None,
) -> Findings:
    """Run the sanity checks on the first images. The network is not changed.

    folder: folder of the cache, or None for no cache. Checks that have finished are taken from it.
    """
    n = min(settings.sanity_checks.n_examples, len(examples))
    if not n:
        return Findings()
    part = Part(examples.x_NCHW[:n], examples.y_N[:n])
    checks = _Checks(model, part, settings.batch_size, device)
    cache = _cache(folder, model, part, settings, threat=threat, device=device)

    def kept(name: str, compute: Callable[[], Tensor]) -> Tensor:
        print(f"sanity checks on {n} images: {name}", flush=True)
        return torch.from_numpy(cache.keep(name, lambda: {"value": compute().numpy()})["value"])

    with perturb.no_parameter_gradients(model):
        numbers = {"examined": float(n), **checks.outputs()}
        flat = kept("zero gradient", checks.zero_gradients)
        numbers["zero_gradient"] = int(flat.sum()) / max(1, int(checks.correct.sum()))
        survive = kept("huge eps", lambda: checks.survive_pgd(HUGE, HUGE_STEPS))
        numbers["huge_eps"] = float(survive.float().mean())
        for steps in STEPS:
            survive = kept(
                f"pgd {steps}", partial(checks.survive_pgd, threat.eps, steps, threat.norm)
            )
            numbers[f"pgd_{steps}"] = float(survive.float().mean())
        queries, seed = settings.sanity_checks.queries, settings.seed
        broken = kept("search", lambda: checks.broken_by_search(survive, threat, queries, seed))
        numbers["black_box_only"] = float(broken.sum()) / n
    return Findings(numbers, tuple(_reasons(numbers)))


def _cache(
    folder: Path | None,
    model: nn.Module,
    part: Part,
    settings: Evaluation,
    *,
    threat: Threat,
    device: torch.device,
) -> Cache:
    """Return the cache of the checks on one network, or one that stores nothing."""
    if folder is None:
        return Cache(None)
    basis = cache_basis(
        network_digest(model, part, device),
        __name__,
        device,
        norm=threat.norm,
        eps=threat.eps,
        seed=settings.seed,
        batch_size=settings.batch_size,
        queries=settings.sanity_checks.queries,
    )
    return Cache(folder, basis)


def _reasons(numbers: dict[str, float]) -> list[str]:
    """Return a text for each failed check. One image above a limit is allowed."""
    n = numbers["examined"]
    one, found = 1.5 / n, []
    if numbers["nan_logits"]:
        found.append(f"{numbers['nan_logits']:.0f} outputs are not a number")
    if numbers["randomness"] > RANDOM:
        found.append(f"randomised: two passes differ by {numbers['randomness']:.2g}")
    if numbers["probabilities"]:
        found.append("outputs are probabilities, expected logits")
    if numbers["zero_gradient"] * numbers["correct"] > max(ZEROS * numbers["correct"], one):
        found.append(f"no gradient on {numbers['zero_gradient']:.0%} of the images")
    if numbers["huge_eps"] > numbers["chance"] + one:
        found.append(
            f"{numbers['huge_eps']:.0%} still correct at eps 1, where chance is "
            f"{numbers['chance']:.0%}"
        )
    if numbers["pgd_50"] - numbers["pgd_200"] > max(GAP, one):
        found.append(
            f"PGD has not converged: {numbers['pgd_50']:.0%} survive 50 steps, "
            f"{numbers['pgd_200']:.0%} survive 200"
        )
    if numbers["black_box_only"] > max(GAP, one):
        found.append(
            f"random search breaks {numbers['black_box_only']:.0%} of the images that withstand "
            "200 steps of PGD"
        )
    return found


class _Checks:
    """The checks of one network. `outputs` sets `correct` (bool N)."""

    def __init__(self, model: nn.Module, part: Part, size: int, device: torch.device) -> None:
        self.model, self.part, self.size, self.device = model, part, size, device
        self.correct = torch.zeros(len(part), dtype=torch.bool)

    def outputs(self) -> dict[str, float]:
        """Check the logits of two passes over the images: randomness, probabilities, NaN."""
        found = {"randomness": 0.0, "probabilities": 1.0, "nan_logits": 0.0}

        def check(where: slice) -> None:
            x = self.part.x_NCHW[where].to(self.device)
            with torch.no_grad():
                one, other = self.model(x), self.model(x)
            self.correct[where] = one.argmax(1).cpu() == self.part.y_N[where]
            apart = (one - other).abs().masked_fill(one.isnan() & other.isnan(), 0.0)
            worst = float(apart.nan_to_num(_FAR, _FAR).max())
            found["randomness"] = max(found["randomness"], worst)
            found["nan_logits"] += int(one.isnan().any(1).sum())
            summed = (one.sum(1) - 1).abs().max() < 1e-5
            found["probabilities"] *= float(one.min() > -1e-5 and bool(summed))

        in_batches(len(self.part), self.size, check, print)
        found["correct"] = int(self.correct.sum()) / len(self.part)
        # A network that always predicts the largest class has this accuracy at any eps.
        found["chance"] = int(self.part.y_N.bincount().max()) / len(self.part)
        return found

    def zero_gradients(self) -> Tensor:
        """Return which correct images have a gradient of 0 (bool N)."""
        found = torch.zeros_like(self.correct)

        def check(where: slice) -> None:
            x = self.part.x_NCHW[where].to(self.device).requires_grad_(True)
            y = self.part.y_N[where].to(self.device)
            (gradient,) = torch.autograd.grad(perturb.cross_entropy_of(y)(self.model(x)), x)
            flat = gradient.flatten(1).abs().amax(1).cpu() == 0
            found[where] = self.correct[where] & flat

        in_batches(len(self.part), self.size, check, print)
        return found

    def survive_pgd(self, eps: float, steps: int, norm: str = "Linf") -> Tensor:
        """Return which images stay correct under PGD from one random start (bool N)."""
        generator = torch.Generator().manual_seed(0)
        start = perturb.uniform_start(self.part.x_NCHW, eps, generator, norm)
        survive = self.correct.clone()

        def check(where: slice) -> None:
            y = self.part.y_N[where].to(self.device)
            adversarial = perturb.ascend(
                self.model,
                self.part.x_NCHW[where].to(self.device),
                start[where].to(self.device),
                perturb.cross_entropy_of(y),
                eps=eps,
                step_size=perturb.RELATIVE_STEP * eps / steps,
                steps=steps,
                norm=norm,
            )
            with torch.no_grad():
                survive[where] &= (self.model(adversarial).argmax(1) == y).cpu()

        in_batches(len(self.part), self.size, check, print)
        return survive

    def broken_by_search(self, among: Tensor, threat: Threat, queries: int, seed: int) -> Tensor:
        """Return which of the images `among` (bool N) random search breaks (bool N)."""
        index = among.nonzero().squeeze(1)
        broken = torch.zeros_like(among)

        def check(where: slice) -> None:
            x, y = self.part.x_NCHW[index[where]], self.part.y_N[index[where]]
            x, y = x.to(self.device), y.to(self.device)
            found = random_search(
                self.model,
                x,
                y,
                norm=threat.norm,
                eps=threat.eps,
                queries=queries,
                restarts=1,
                seed=seed,
            )
            with torch.no_grad():
                broken[index[where]] = (self.model(found).argmax(1) != y).cpu()

        in_batches(len(index), self.size, check, print)
        return broken
