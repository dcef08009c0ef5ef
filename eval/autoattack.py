"""AutoAttack: APGD-CE, targeted APGD-DLR, targeted FAB and Square, worst case over all four.

Source: Croce and Hein, ICML 2020, with the package pyautoattack. Each component attacks the images
that are still robust, with the batches and seeds of the package. The outcome for each image
therefore equals the outcome of one call of the package. Each finished batch is stored in the cache:
an interrupted evaluation continues from there, and an evaluation with more components uses the
results of one with fewer components.
"""

import json
import logging
import re
from collections.abc import Callable
from typing import ClassVar, Literal

import numpy as np
import torch
from pyautoattack import AutoAttack, checks
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from robsparse.compute import perturb
from robsparse.evaluation.attacks import AttackContext, Outcome
from robsparse.evaluation.tally import AttackProgress, Tally, in_batches
from robsparse.schema import AttackParams

LABEL = "AutoAttack"

# pyautoattack warns if Square lowers the accuracy by more than this share. It cannot check this if
# Square runs as a separate call. With few images, one broken image would exceed the share;
# therefore a warning needs at least two broken images.
SQUARE_MARGIN = 0.002


class Params(AttackParams):
    """version: a preset of components and their budgets in the package."""

    VERSIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        "rand": ("apgd-ce", "apgd-dlr"),
    }
    version: Literal["standard", "plus", "rand"] = "standard"
    components: tuple[str, ...] = Field(
        (), description="components of the version to run, in this order; empty: all of them"
    )

    @field_validator("components")
    @classmethod
    def _of_the_version(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = cls.VERSIONS[info.data.get("version", "standard")]
        if len(set(names)) != len(names) or not set(names) <= set(known):
            raise ValueError(f"expected each at most once of: {', '.join(known)}")
        return names

    def parts(self) -> tuple[str, ...]:
        """Return the components that run, in their order."""
        return self.components or self.VERSIONS[self.version]

    @property
    def described(self) -> str:
        """The version; also the components if they differ from those of the version."""
        parts, all_parts = self.parts(), self.VERSIONS[self.version]
        if parts == all_parts:
            return self.version
        how = "in this order" if len(parts) == len(all_parts) else "only"
        return f"{self.version}, {', '.join(parts)} {how}"

    @property
    def qualifier(self) -> str:
        """What tables print after "AutoAttack": empty for the complete standard version."""
        if self.described == "standard":
            return ""
        return self.described.removeprefix("standard, ")


def passes(params: Params) -> tuple[int, int]:
    """Return forward-and-backward passes and forward-only passes for an image that stays robust.

    The numbers are for ten classes. APGD takes 100 steps for each restart; targeted APGD takes 100
    steps for each of 9 classes. FAB is the same, but untargeted FAB computes the gradients of all
    classes. Square makes 5,000 queries. "plus" restarts APGD-CE, APGD-DLR and FAB 5 times. "rand"
    averages 20 gradients in each step.
    """
    often = {"standard": 1, "plus": 5, "rand": 20}[params.version]
    costs = {
        "apgd-ce": (100 * often, often),
        "apgd-dlr": (100 * often, often),
        "apgd-t": (900, 9),
        "fab": (500 * often, 100 * often),
        "fab-t": (900, 900),
        "square": (0, 5000),
    }
    backward, forward = zip(*(costs[name] for name in params.parts()), strict=True)
    return sum(backward), sum(forward)


def run(
    model: nn.Module, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> Outcome:
    """Return which images are robust after each component, and the warnings of the package."""
    tally = Tally(x_NCHW, y_N, context)
    components: dict[str, Tensor] = {}
    # The package seeds torch's global generator and computes gradients of all weights.
    cuda = [context.device] if context.device.type == "cuda" else []
    with (
        _Warnings() as warnings,
        perturb.no_parameter_gradients(model),
        torch.random.fork_rng(devices=cuda),
    ):
        if len(y_N):
            package = _package(model, x_NCHW, params, context)
            _check(package, x_NCHW, y_N, params, context)
        for position, name in enumerate(params.parts()):
            before = tally.robust.clone()
            if before.any():
                so_far = [params.version, *params.parts()[: position + 1]]
                _run_component(_searcher(package, name), model, tally, warnings, so_far)
            components[name] = tally.robust.clone()
            if name == "square":
                warnings.check_square(before, tally.robust)
    return tally.outcome({"version": params.described}, components, warnings.texts())


def _run_component(
    search: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tally: Tally,
    warnings: "_Warnings",
    so_far: list[str],
) -> None:
    """Attack the images that are still robust with the last component of `so_far`.

    `so_far` is the version and all components so far. It is the key of the outcome in the cache.
    """
    name = so_far[-1]
    context, key = tally.context, json.dumps(so_far)
    alive = tally.robust.nonzero().squeeze(1)
    done = 0
    if found := context.cache.get(key):
        done = int(found.pop("done"))
        warnings.restore(json.loads(str(found.pop("warnings"))))
        tally.restore(found)
        context.report(f"{name}: {done} of {len(alive)} images taken from an earlier run")
    progress = AttackProgress(name, len(alive), context.report)

    def work(where: slice) -> None:
        index = alive[done:][where]
        x, y = tally.x_NCHW[index].to(context.device), tally.y_N[index].to(context.device)
        with torch.no_grad():
            adversarial = search(x.clone(), y.clone())
        tally.record(model, index, adversarial)
        context.cache.put(
            key,
            done=np.array(done + where.stop),
            warnings=np.array(json.dumps(warnings.found)),
            **tally.arrays(),
        )
        progress.update(done + where.stop, int(tally.robust.sum()))

    in_batches(len(alive) - done, context.batch_size, work, context.report)
    progress.close(int(tally.robust.sum()), len(alive))


def _package(
    model: nn.Module, x_NCHW: Tensor, params: Params, context: AttackContext
) -> AutoAttack:
    package = AutoAttack(
        model,
        norm=context.norm,
        eps=context.eps,
        version=params.version,
        seed=context.seed,
        device=context.device,
    )
    with torch.no_grad():
        classes = model(x_NCHW[:1].to(context.device)).shape[1]
    # The package always uses nine targets; with fewer classes some of them would not exist.
    for part in (package.apgd_targeted, package.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    return package


def _check(
    package: AutoAttack, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> None:
    """Run the package's checks of the network once, on the first batch."""
    x, y = (v[: context.batch_size].to(context.device) for v in (x_NCHW, y_N))
    logger = package.logger
    if params.version != "rand":
        checks.check_randomized(package.get_logits, x, y, bs=len(x), logger=logger)
    classes = checks.check_range_output(package.get_logits, x, logger=logger)
    # The package counts calls of all networks together. Without this reset it would report every
    # network after a dynamic one as dynamic.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    checks.check_dynamic(package.model, x, logger=logger)
    targets = package.apgd_targeted.n_target_classes, package.fab.n_target_classes
    checks.check_n_classes(classes, list(params.parts()), *targets, logger=logger)


def _searcher(package: AutoAttack, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return perturb(x, y) of one component, with the settings and seed of the package's loop."""
    part = {"apgd-t": package.apgd_targeted, "square": package.square}.get(
        name, package.fab if name.startswith("fab") else package.apgd
    )
    if name in ("apgd-ce", "apgd-dlr"):
        part.loss = name.removeprefix("apgd-")
    if name in ("fab", "fab-t"):
        part.targeted = name == "fab-t"
        part.n_restarts = 1 if part.targeted else part.n_restarts
    part.seed = package.get_seed()
    return part.perturb


class _Warnings(logging.Handler):
    """Collects the warnings of the package.

    Texts that differ only in numbers are one kind; of each kind the one with the largest numbers is
    kept.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: dict[str, str] = {}
        self.logger = logging.getLogger("auto-attack")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().split(" See ")[0]
        kind, count = re.sub(r"\d+", "#", text), [int(n) for n in re.findall(r"\d+", text)]
        if count >= [int(n) for n in re.findall(r"\d+", self.found.get(kind, ""))]:
            self.found[kind] = text

    def restore(self, found: dict[str, str]) -> None:
        """Add the warnings of an earlier run."""
        self.found |= found

    def check_square(self, before: Tensor, after: Tensor) -> None:
        """Warn if Square broke images that survived the other attacks, as the package does.

        The package cannot check this when Square runs as a separate call.
        """
        broken = int(before.sum() - after.sum())
        if broken > max(1, SQUARE_MARGIN * len(before)):
            self.found["square"] = (
                f"Square broke {broken} of the {int(before.sum())} images that survived the "
                "white-box attacks, which may be unreliable on this model"
            )

    def texts(self) -> list[str]:
        return list(self.found.values())

    def __enter__(self) -> "_Warnings":
        self._before = self.logger.propagate, self.logger.level
        self.logger.addHandler(self)
        self.logger.propagate = False
        self.logger.setLevel(logging.WARNING)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate, level = self._before
        self.logger.setLevel(level)
