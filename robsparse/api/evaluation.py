"""Attacks any network from Python: accuracies with intervals, and sanity checks."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from robsparse.base import registry
from robsparse.base.errors import UsageError
from robsparse.datasets import Part
from robsparse.evaluation import sanity_checks as checks
from robsparse.evaluation.job import first_examples
from robsparse.evaluation.runner import AttackResult, attack_model, evaluation_errors
from robsparse.networks.construct import check_network
from robsparse.records.rows import wilson_interval
from robsparse.schema.evaluation import Evaluation as Settings
from robsparse.schema.fields import Strict
from robsparse.schema.threat import Norm, Threat
from robsparse.study import messages
from robsparse.study.planned import Attack, planned_attacks

Kind = TypeVar("Kind", bound=Strict)


@dataclass(frozen=True)
class Evaluation:
    """The outcome of an evaluation.

    accuracies: one row for each component of an attack, and one for the whole attack ("all").
        Columns: attack, component, accuracy in [0,1], n_correct, n_examples, ci_low, ci_high (95 %
        interval of Wilson), norm, eps, steps, restarts, version, max_perturbation, seconds.
    correct: for each attack, which images are classified correctly under it (bool N); "clean" is
        without an attack.
    sanity_checks: numbers of `robsparse.evaluation.sanity_checks`; empty if they were left out.
    potentially_unreliable: why the accuracies may be too high, "" if nothing says so.
    """

    accuracies: pd.DataFrame
    correct: dict[str, np.ndarray]
    sanity_checks: dict[str, float]
    potentially_unreliable: str

    @property
    def clean_accuracy(self) -> float:
        """The share of images that are classified correctly without an attack."""
        return float(self.correct["clean"].mean())

    @property
    def robust_accuracy(self) -> float:
        """The share of images that are classified correctly under each of the attacks."""
        return float(np.logical_and.reduce([*self.correct.values()]).mean())

    def __str__(self) -> str:
        whole = self.accuracies[self.accuracies.component == "all"]
        lines = [
            f"{row.attack:12s} {100 * row.accuracy:6.2f} % [{100 * row.ci_low:.2f}, "
            f"{100 * row.ci_high:.2f}], {row.n_correct} of {row.n_examples} images"
            for row in whole.itertuples()
        ]
        reasons = self.potentially_unreliable
        return "\n".join([*lines, *([f"potentially unreliable: {reasons}"] if reasons else [])])


def evaluate(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    *,
    eps: float | str,
    norm: Norm = "Linf",
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("pgd", "autoattack"),
    sanity_checks: int = 100,
    batch_size: int = 250,
    seed: int = 0,
    verbose: bool = False,
) -> Evaluation:
    """Attack a network on images; return accuracies with intervals and sanity checks.

    The attacks, their defaults and the sanity checks are those of a study (docs/evaluation.md).
    Each attack gets the images that the network classifies correctly.

    Args:
        model: x_NCHW in [0,1] -> logits_NK, on any device. It is put into eval mode.
        images: x_NCHW in [0,1].
        labels: y_N in 0..K-1.
        eps: radius in the units of pixels in [0,1]: a number, or a text like "8/255".
        norm: "Linf" or "L2".
        attacks: names of attacks, or a mapping from a name to its parameters, e.g. {"pgd":
            {"steps": 20}}. Clean accuracy is always measured.
        sanity_checks: number of images of the sanity checks, from the first; 0: none.
        batch_size: number of images in a batch.
        seed: the seed of all random numbers of the attacks.
        verbose: print the progress.

    Raises:
        UsageError: if a setting, the images or the labels are wrong, or if the network does not map
            the images to logits.
        EvaluationError: if the network or an attack fails.
    """
    threat = _checked(Threat, {"norm": norm, "eps": eps})
    planned = _planned(attacks, threat)
    settings = _checked(
        Settings,
        {
            "n_examples": len(labels),
            "batch_size": batch_size,
            "seed": seed,
            "selections": {"last": [attack.name for attack in planned]},
            "sanity_checks": {"n_examples": sanity_checks},
        },
    )
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    examples = _examples(model.eval(), images, labels, device)
    with contextlib.ExitStack() as stack:
        if not verbose:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        results = attack_model(
            model, examples, planned, seed=seed, batch_size=batch_size, device=device
        )
        with evaluation_errors("sanity checks"):
            findings = checks.examine(model, examples, settings, threat, device)
    return Evaluation(
        pd.DataFrame([row for result in results for row in _rows(result)]),
        {result.attack: result.robust["all"].numpy() for result in results},
        findings.numbers,
        findings.potentially_unreliable([result.outcome for result in results]),
    )


def _planned(
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]], threat: Threat
) -> list[Attack]:
    """Return the attacks, `clean` first. Raises UsageError for a wrong name or parameter."""
    params = {}
    for name in dict.fromkeys(["clean", *attacks]):
        values = attacks.get(name, {}) if isinstance(attacks, Mapping) else {}
        kind = cast(type[Strict], registry.entry("attack", name).params)
        params[name] = _checked(kind, dict(values), f"attacks.{name}")
    planned = [*planned_attacks(params, threat).values()]
    for attack in planned:
        if attack.surrogate is not None:
            raise UsageError(f"attacks.{attack.name}: attacks through another network of a study")
    return planned


def _checked(kind: type[Kind], values: dict[str, Any], prefix: str = "") -> Kind:
    """Return the settings as a model. Raises UsageError with a line for each wrong setting."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError("\n".join(messages.lines(error, values, prefix))) from None


def _examples(
    model: nn.Module,
    images: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    device: torch.device,
) -> Part:
    """Return checked images and labels on the CPU. Raises UsageError, see `evaluate`."""
    x_NCHW, y_N = (torch.as_tensor(value).detach().cpu() for value in (images, labels))
    if x_NCHW.ndim != 4 or not x_NCHW.is_floating_point():
        shape = tuple(x_NCHW.shape)
        raise UsageError(f"images: expected numbers x_NCHW in [0,1], found {x_NCHW.dtype}, {shape}")
    if y_N.shape != x_NCHW.shape[:1] or y_N.is_floating_point() or not len(y_N):
        raise UsageError(
            f"labels: expected one class for each of the {len(x_NCHW)} images, found {y_N.dtype} "
            f"of shape {tuple(y_N.shape)}"
        )
    first = x_NCHW[:2].to(device)
    try:
        with torch.no_grad():
            classes = model(first).shape[1]
    except Exception:  # the next line reports it
        classes = int(y_N.max()) + 1
    check_network(model, first, classes)
    return first_examples(Part(x_NCHW, y_N.long()), len(y_N), classes)


def _rows(result: AttackResult) -> list[dict[str, Any]]:
    """Return the rows of `Evaluation.accuracies` of one attack."""
    settings, found = result.outcome.settings, list[dict[str, Any]]()
    for component, robust in result.robust.items():
        n, correct = len(robust), int(robust.sum())
        low, high = wilson_interval(correct, n)
        row: dict[str, Any] = {"attack": result.attack, "component": component}
        row |= {"accuracy": correct / n, "n_correct": correct, "n_examples": n}
        row |= {"ci_low": low, "ci_high": high}
        row |= {"norm": result.context.norm, "eps": result.context.eps}
        row |= {name: settings.get(name) for name in ("steps", "restarts", "version")}
        if component == "all":
            row |= {"max_perturbation": result.outcome.max_perturbation, "seconds": result.seconds}
        found.append(row)
    return found
