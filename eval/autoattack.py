"""AutoAttack: APGD-CE, targeted APGD-DLR, targeted FAB and Square, worst case over all four.

Source: Croce and Hein, ICML 2020, through the package pyautoattack. Its components are run one at a
time on the images that are still robust, in the package's own batches and from its own seeds, so
that the outcome equals one call of it image for image; each finished batch is kept, so that a
killed evaluation goes on from there and a longer one takes over what a shorter one has found.
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

# pyautoattack warns when Square lowers the accuracy by more than this; run alone it cannot tell. On
# few images a single one would do: here it takes two, as one says nothing.
SQUARE_MARGIN = 0.002


class Params(AttackParams):
    """version: the package's preset of components and their budgets."""

    VERSIONS: ClassVar[dict[str, tuple[str, ...]]] = {
        "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
        "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
        "rand": ("apgd-ce", "apgd-dlr"),
    }
    version: Literal["standard", "plus", "rand"] = "standard"
    components: tuple[str, ...] = Field(
        (), description="some of the version's components, in this order; empty: all of them"
    )

    @field_validator("components")
    @classmethod
    def _of_the_version(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = cls.VERSIONS[info.data.get("version", "standard")]
        if len(set(names)) != len(names) or not set(names) <= set(known):
            raise ValueError(f"expected each at most once of: {', '.join(known)}")
        return names

    def parts(self) -> tuple[str, ...]:
        """The components that run, in their order."""
        return self.components or self.VERSIONS[self.version]

    @property
    def described(self) -> str:
        """The version, and the components if they are not all of it in its order."""
        parts, all_parts = self.parts(), self.VERSIONS[self.version]
        if parts == all_parts:
            return self.version
        how = "in this order" if len(parts) == len(all_parts) else "only"
        return f"{self.version}, {', '.join(parts)} {how}"

    @property
    def qualifier(self) -> str:
        """Empty for the whole standard version alone, which is what "AutoAttack" stands for."""
        if self.described == "standard":
            return ""
        return self.described.removeprefix("standard, ")


def passes(params: Params) -> tuple[int, int]:
    """Forward-and-backward passes and forward-only passes over an image that survives.

    With ten classes: APGD takes 100 steps a restart and, targeted, for each of 9 classes; so does
    FAB, and asks for all classes' gradients when it is not targeted; Square makes 5,000 queries.
    "plus" restarts APGD-CE, APGD-DLR and FAB 5 times; "rand" averages 20 gradients a step.
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
    """Which images survive each component, and what the package warned of."""
    tally = Tally(x_NCHW, y_N, context)
    components: dict[str, Tensor] = {}
    # The package seeds torch's global generator and asks for gradients of all weights.
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
                said = [params.version, *params.parts()[: position + 1]]
                _run_component(_searcher(package, name), model, tally, warnings, said)
            components[name] = tally.robust.clone()
            if name == "square":
                warnings.of_square(before, tally.robust)
    return tally.outcome({"version": params.described}, components, warnings.texts())


def _run_component(
    search: Callable[[Tensor, Tensor], Tensor],
    model: nn.Module,
    tally: Tally,
    warnings: "_Warnings",
    said: list[str],
) -> None:
    """Let the last component of `said` search for the images that are still robust.

    `said` is the version and all components so far: the name under which the outcome is kept.
    """
    name = said[-1]
    context, key = tally.context, json.dumps(said)
    alive = tally.robust.nonzero().squeeze(1)
    done = 0
    if found := context.cache.get(key):
        done = int(found.pop("done"))
        warnings.take(json.loads(str(found.pop("warnings"))))
        tally.restore(found)
        context.report(f"{name}: {done} of {len(alive)} images taken from an earlier run")
    progress = AttackProgress(name, len(alive), context.report)

    def work(where: slice) -> None:
        index = alive[done:][where]
        x, y = tally.x_NCHW[index].to(context.device), tally.y_N[index].to(context.device)
        with torch.no_grad():
            adversarial = search(x.clone(), y.clone())
        tally.judge(model, index, adversarial)
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
    # The package fixes nine targets; with fewer classes it would look for labels beyond them.
    for part in (package.apgd_targeted, package.fab):
        part.n_target_classes = min(part.n_target_classes, classes - 1)
    return package


def _check(
    package: AutoAttack, x_NCHW: Tensor, y_N: Tensor, params: Params, context: AttackContext
) -> None:
    """The package's own checks of the network, on the first batch, once."""
    x, y = (v[: context.batch_size].to(context.device) for v in (x_NCHW, y_N))
    logger = package.logger
    if params.version != "rand":
        checks.check_randomized(package.get_logits, x, y, bs=len(x), logger=logger)
    classes = checks.check_range_output(package.get_logits, x, logger=logger)
    # The package never forgets a dynamic network: later ones would be taken for one.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    checks.check_dynamic(package.model, x, logger=logger)
    targets = package.apgd_targeted.n_target_classes, package.fab.n_target_classes
    checks.check_n_classes(classes, list(params.parts()), *targets, logger=logger)


def _searcher(package: AutoAttack, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """perturb(x, y) of one component, set and seeded as the package's own loop does it."""
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
    """Collects what the package warns of: each kind of text once, the one with the most points."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: dict[str, str] = {}
        self.logger = logging.getLogger("auto-attack")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage().split(" See ")[0]
        kind, count = re.sub(r"\d+", "#", text), [int(n) for n in re.findall(r"\d+", text)]
        if count >= [int(n) for n in re.findall(r"\d+", self.found.get(kind, ""))]:
            self.found[kind] = text

    def take(self, found: dict[str, str]) -> None:
        """What an earlier run was warned of."""
        self.found |= found

    def of_square(self, before: Tensor, after: Tensor) -> None:
        """The package's check of Square, which it cannot make when it runs alone."""
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
