"""Runs the attacks of an evaluation on one network."""

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from robsparse.base import registry
from robsparse.base.errors import RunError, UsageError, one_line
from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext, Outcome, no_surrogate
from robsparse.evaluation.cache import Cache, cache_basis, network_digest
from robsparse.fast import folding, proof
from robsparse.schema.fields import Strict
from robsparse.study.cells import derive_seed
from robsparse.study.planned import Attack


class EvaluationError(RunError):
    """An evaluation cannot continue, for example because the network fails on an image."""


@contextmanager
def evaluation_errors(step: str) -> Iterator[None]:
    """Turn an error of an attack or of the network into an EvaluationError of one line."""
    try:
        yield
    except (UsageError, RunError, OSError):
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise EvaluationError(
            f"{step}: {one_line(error)} ({frame.filename}, line {frame.lineno}); finished parts "
            "are in the cache for the next call"
        ) from error


@dataclass(frozen=True)
class AttackResult:
    """The outcome of one attack, for all images of the evaluation.

    robust: for each component, and for "all", the images that stay robust (bool N). An image that
        was not attacked is not robust.
    outcome: the result for the attacked images.
    indices: the indices of the attacked images (int).
    attacked_on: "view" if the attack used the folded view, or "network".
    """

    attack: str
    robust: dict[str, Tensor]
    outcome: Outcome
    context: AttackContext
    seconds: float
    indices: Tensor
    attacked_on: str = "network"


def attack_model(
    model: nn.Module,
    examples: Part,
    attacks: Sequence[Attack],
    *,
    seed: int,
    batch_size: int,
    device: torch.device,
    cache: Path | None = None,
    surrogate: Callable[[str], nn.Module] = no_surrogate,
    folded: bool = False,
) -> list[AttackResult]:
    """Run attacks, `clean` first, on the images that are classified correctly.

    Args:
        model: the network. It is put into eval mode.
        examples: the images of the evaluation.
        attacks: the attacks with norm and eps, as the study resolves them.
        seed: the seed of the evaluation. The seed of each attack is derived from it.
        batch_size: the number of images in a batch.
        device: the device of the model.
        cache: folder of the cache, or None for no cache. A later call with the same network, images
            and settings uses the results from it.
        surrogate: surrogate(method) returns another network, for black-box transfer attacks.
        folded: attack the folded view of the network. It is faster, and its outputs are equal up to
            rounding. Where it fails, the network is attacked. False for external code.

    Raises:
        AssertionError: if a module of the model stays in train mode.
    """
    model.eval()
    assert not any(module.training for module in model.modules()), "expected eval mode"
    first = examples.x_NCHW[: proof.IMAGES].to(device)
    run = _Run(
        folding.folded_view(model, first) if folded else model,
        examples,
        seed,
        batch_size,
        device,
        surrogate,
        cache,
        network_digest(model, examples, device) if cache else "",
    )
    correct = torch.ones(len(examples), dtype=torch.bool)
    results: list[AttackResult] = []
    for attack in attacks:
        result = run.attack(attack, correct)
        results.append(result)
        if attack.name == "clean":
            correct = result.robust["all"]
    return results


@dataclass(frozen=True)
class _Run:
    """The values that all attacks on one network share.

    attacked: the network or its folded view.
    digest: the digest of network and images, or "" without a cache.
    """

    attacked: nn.Module
    examples: Part
    seed: int
    batch_size: int
    device: torch.device
    surrogate: Callable[[str], nn.Module]
    cache: Path | None
    digest: str

    def attack(self, attack: Attack, correct: Tensor) -> AttackResult:
        """Run one attack on the images where `correct` is true (bool N)."""
        context = self._with_cache(self._context(attack), attack)
        module = registry.load("attack", attack.base)
        images = self.examples.x_NCHW[correct], self.examples.y_N[correct]
        with evaluation_errors(attack.name):
            outcome, seconds = _outcome(module, self.attacked, images, attack.params, context)
        robust = {part: _spread(flags, correct) for part, flags in outcome.components.items()}
        whole = list(robust.values())[-1]
        robust.setdefault("all", whole)
        count = f"{int(whole.sum())}/{len(whole)}"
        print(f"{attack.name}: {count} correct, {seconds:.1f} s", flush=True)
        indices = correct.nonzero().squeeze(1)
        used = folding.runs_on(self.attacked)
        return AttackResult(attack.name, robust, outcome, context, seconds, indices, used)

    def _context(self, attack: Attack) -> AttackContext:
        return AttackContext(
            attack.norm,
            attack.eps,
            derive_seed("attack", attack.name, self.seed) % 2**31,
            self.batch_size,
            self.device,
            report=lambda text: print(f"{attack.name}: {text}", flush=True),
            surrogate=self.surrogate,
            images=self.examples.x_NCHW,
        )

    def _with_cache(self, context: AttackContext, attack: Attack) -> AttackContext:
        """Return the context with a cache for this attack, network and surrogate."""
        if self.cache is None:
            return context
        other = None
        if attack.surrogate is not None:
            other = network_digest(self.surrogate(attack.surrogate), self.examples, self.device)
        basis = cache_basis(
            self.digest,
            registry.entry("attack", attack.base).module,
            self.device,
            norm=context.norm,
            eps=context.eps,
            seed=context.seed,
            batch_size=context.batch_size,
            attacked_on=folding.runs_on(self.attacked),
            surrogate=other,
        )
        return replace(context, cache=Cache(self.cache, basis))


def _outcome(
    module: ModuleType,
    model: nn.Module,
    images: tuple[Tensor, Tensor],
    params: Strict,
    context: AttackContext,
) -> tuple[Outcome, float]:
    """Return the outcome of one attack and its seconds. A result in the cache is used."""
    name = params.model_dump_json()
    if arrays := context.cache.get(name):
        outcome = Outcome.from_arrays(arrays)
        context.report("taken from an earlier run")
        return outcome, outcome.earlier_seconds
    began = time.perf_counter()
    outcome = module.run(model, *images, params, context)
    seconds = outcome.earlier_seconds + time.perf_counter() - began
    context.cache.put(name, **outcome.arrays(seconds))
    return outcome, seconds


def _spread(flags: Tensor, attacked: Tensor) -> Tensor:
    """Return flags of all images (bool N). An image that was not attacked is not robust."""
    spread = torch.zeros_like(attacked)
    spread[attacked] = flags.cpu()
    return spread
