"""Minimum norm: search for the smallest perturbation that breaks each image, in several ways.

One run gives an upper bound of the robust accuracy at every eps. The searches, in order:
- interpolation towards other images that the network assigns to another class (at an L-inf eps of 1
  every image can be changed to every other image);
- FMN;
- PGD and random search (Square) at several radii;
- FMN again, from the nearest image found.
Bisection then shortens each perturbation. A network without useful gradients therefore does not
look robust, unless it assigns all test images to one class.

Sources: Pintor et al., NeurIPS 2021 (FMN); Madry et al., ICLR 2018 (PGD); Andriushchenko et al.,
ECCV 2020 (Square); Brendel et al., ICLR 2018 (start at another image, move to the boundary).
"""

import json
import math

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.compute.perturb import length
from robsparse.evaluation import fast_minimum_norm
from robsparse.evaluation.attacks import AttackContext, Outcome, outcome_from_distances
from robsparse.evaluation.random_search import random_search
from robsparse.evaluation.tally import AttackProgress, in_batches
from robsparse.schema import AttackParams

LABEL = "Minimum norm"
GIVES_DISTANCES = True

_POOL = 1000  # number of images that may serve as images of other classes
_HALVINGS = 10  # steps of bisection after each search


class Params(AttackParams):
    """The budget of each search for an image."""

    fmn_steps: PositiveInt = Field(50, description="gradient steps of FMN in each of its two runs")
    radii: int = Field(
        5,
        ge=3,
        description="number of radii of PGD and random search: half of eps, then from eps in equal "
        "ratios to the longest possible perturbation, which is 1 in L-inf",
    )
    steps: PositiveInt = Field(20, description="gradient steps of PGD at each radius")
    restarts: PositiveInt = Field(1, description="random starts of PGD at each radius")
    queries: PositiveInt = Field(50, description="queries of random search at each radius")
    neighbours: NonNegativeInt = Field(
        3, description="number of nearest images of other classes to interpolate with"
    )


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image that stays robust."""
    searches = params.neighbours + 2 + params.radii * (params.restarts + 1)
    return (
        2 * params.fmn_steps + params.radii * params.steps * params.restarts,
        1 + searches * (1 + _HALVINGS) + params.radii * params.queries,
    )


def ladder(eps: float, longest: float, count: int) -> list[float]:
    """Return the radii to search at, ascending: eps / 2, then `count` - 1 from eps to `longest`."""
    eps = min(eps, longest)
    ratios = [(longest / eps) ** (i / (count - 2)) for i in range(count - 2)]
    return sorted({eps / 2, *(eps * ratio for ratio in ratios), longest})


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return the smallest perturbation found for each image; above eps the image is robust.

    Random draws are the same for each batch. Finished batches are stored in the cache.
    """
    key = json.dumps(["batches", params.model_dump(mode="json")], sort_keys=True)
    distances, done = torch.full((len(y_N),), torch.inf), 0
    if found := context.cache.get(key):
        distances, done = torch.from_numpy(found["distances"]), int(found["done"])
        context.report(f"{done} of {len(y_N)} images taken from an earlier run")
    progress = AttackProgress(LABEL, len(y_N), context.report)

    def work(where: slice) -> None:
        stop = done + where.stop
        index = slice(done + where.start, stop)
        search = _Search(model, x_NCHW[index], y_N[index], params, context)
        distances[index] = search.distances(pool, classes).cpu()
        context.cache.put(key, distances=distances.numpy(), done=np.array(stop))
        progress.update(stop, int((distances > context.eps).sum()))

    with perturb.no_parameter_gradients(model):
        pool, classes = _pool(model, x_NCHW if context.images is None else context.images, context)
        in_batches(len(y_N) - done, context.batch_size, work, context.report)
    settings = {"steps": params.steps, "restarts": params.restarts}
    outcome = outcome_from_distances(distances, context.eps, settings)
    progress.close(int(outcome.components["all"].sum()), len(y_N))
    return outcome


def _pool(model: nn.Module, x_NCHW: Tensor, context: AttackContext) -> tuple[Tensor, Tensor]:
    """Return some images and the classes that the network predicts for them."""
    pool = x_NCHW[:_POOL].to(context.device)
    classes = torch.zeros(len(pool), dtype=torch.int64, device=context.device)

    def predict(where: slice) -> None:
        with torch.no_grad():
            classes[where] = model(pool[where]).argmax(1)

    in_batches(len(pool), context.batch_size, predict, context.report)
    return pool, classes


class _Search:
    """The smallest perturbations found so far for one batch.

    best: their lengths (float B, inf if none has been found).
    nearest: the images with these perturbations.
    """

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, params: Params, context: AttackContext
    ) -> None:
        self.model, self.params, self.context = model, params, context
        self.x, self.y = x.to(context.device), y.to(context.device)
        self.best = torch.full((len(y),), torch.inf, device=context.device)
        self.nearest = self.x.clone()

    def distances(self, pool: Tensor, classes: Tensor) -> Tensor:
        """Run all searches; return the lengths of the smallest perturbations (float B)."""
        self.towards(pool, classes)
        self.adapt(self.beyond(0.0))
        generator = torch.Generator().manual_seed(self.context.seed)
        longest = 1.0 if self.context.norm == "Linf" else math.sqrt(self.x[0].numel())
        for radius in ladder(self.context.eps, longest, self.params.radii):
            for _ in range(self.params.restarts):
                self.ascend(radius, generator)
            self.query(radius)
        known = self.best.isfinite().nonzero().squeeze(1)
        self.adapt(known, self.nearest[known])
        return self.best

    def beyond(self, radius: float) -> Tensor:
        """Return the indices of images without a known perturbation within the radius (int)."""
        return (self.best > radius).nonzero().squeeze(1)

    def towards(self, pool: Tensor, classes: Tensor) -> None:
        """Interpolate between each image and the nearest images with another predicted class."""
        p = torch.inf if self.context.norm == "Linf" else 2.0
        apart = torch.cdist(self.x.flatten(1), pool.flatten(1), p=p)
        apart[classes == self.y[:, None]] = torch.inf
        nearest = apart.topk(min(self.params.neighbours, len(pool)), largest=False)
        for lengths, chosen in zip(nearest.values.T, nearest.indices.T, strict=True):
            there = lengths.isfinite().nonzero().squeeze(1)
            self.offer(there, pool[chosen[there]], torch.inf)

    def adapt(self, index: Tensor, start: Tensor | None = None) -> None:
        """Run FMN from the images at `index`, or from versions of them that break the network."""
        if not len(index):
            return
        found = fast_minimum_norm.perturbed(
            self.model,
            self.x[index],
            self.y[index],
            norm=self.context.norm,
            steps=self.params.fmn_steps,
            start=start,
        )
        self.offer(index, found, torch.inf)

    def ascend(self, radius: float, generator: torch.Generator) -> None:
        """Run PGD within a radius, from a random start."""
        start = perturb.uniform_start(self.x.cpu(), radius, generator, self.context.norm)
        index = self.beyond(radius)
        if not len(index):
            return
        found = perturb.ascend(
            self.model,
            self.x[index],
            start.to(self.x.device)[index],
            perturb.cross_entropy_of(self.y[index]),
            eps=radius,
            step_size=perturb.RELATIVE_STEP * radius / self.params.steps,
            steps=self.params.steps,
            norm=self.context.norm,
        )
        self.offer(index, found, radius)

    def query(self, radius: float) -> None:
        """Run random search within a radius."""
        index = self.beyond(radius)
        if not len(index):
            return
        found = random_search(
            self.model,
            self.x[index],
            self.y[index],
            norm=self.context.norm,
            eps=radius,
            queries=self.params.queries,
            restarts=1,
            seed=self.context.seed,
        )
        self.offer(index, found, radius)

    def offer(self, index: Tensor, found: Tensor, radius: float) -> None:
        """Record versions of the images at `index` that break the network, and shorten them.

        Bisection between the clean image and the version finds a shorter perturbation. `found` are
        the versions, all within `radius`.
        """
        wrong = self.is_wrong(index, found)
        index, found = index[wrong], found[wrong]
        x = self.x[index]
        # A length exceeds the radius only by rounding.
        high = length(found - x, self.context.norm).clamp(max=radius)
        low = torch.zeros_like(high)
        self.record(index, found, high)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            between = within(x, found, middle, self.context.norm)
            wrong = self.is_wrong(index, between)
            low, high = low.where(wrong, middle), middle.where(wrong, high)
            lengths = torch.minimum(length(between - x, self.context.norm), middle)
            self.record(index[wrong], between[wrong], lengths[wrong])

    def record(self, index: Tensor, found: Tensor, lengths: Tensor) -> None:
        """Record versions of the images at `index` that break the network, if they are nearer."""
        nearer = lengths < self.best[index]
        index = index[nearer]
        self.best[index], self.nearest[index] = lengths[nearer], found[nearer]

    def is_wrong(self, index: Tensor, images: Tensor) -> Tensor:
        """Return which versions of the images at `index` the network misclassifies (bool)."""
        if not len(index):  # foreign code may fail on an empty batch
            return index.bool()
        with torch.no_grad():
            return self.model(images).argmax(1) != self.y[index]


def within(x: Tensor, target: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return the points nearest to `target` with a distance of at most `radius` (float N) to x."""
    radius = radius.view(-1, *[1] * (x.ndim - 1))
    if norm == "Linf":
        return target.clamp(x - radius, x + radius)
    lengths = length(target - x, norm).view_as(radius)
    return (x + (target - x) * (radius / lengths.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)
