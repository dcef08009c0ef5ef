"""The contract of an attack, and what attacks share.

An attack is a file in eval/ with `Params` (a `AttackParams` if it perturbs images) and

    def run(model, x_NCHW, y_N, params, threat: AttackContext) -> Outcome
    def passes(params) -> tuple[int, int]

`run` gets the images which the model classifies correctly (`clean` gets them all); `passes` says
what an image that survives costs, for estimates of time.
"""

import hashlib
import json
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from tqdm import tqdm

from robsparse.base.files import atomic
from robsparse.compute import perturb, randomness
from robsparse.compute.machine import is_out_of_memory
from robsparse.datasets import Part
from robsparse.networks import weights
from robsparse.study import source_code

SECONDS_BETWEEN_LINES = 10.0
LOOKED_AT = 4  # images that a network is told apart by
PICTURES = 32  # adversarial images that are kept for people to look at


class Cache:
    """Outcomes of parts of an evaluation, kept so that a killed one goes on where it was.

    Each part is a file of arrays, written whole or not at all, under a name that stands for all
    that decided it, see `robsparse.study.fingerprints.part`.
    """

    def __init__(self, folder: Path | None, basis: str = "") -> None:
        """Keep parts in `folder`, or nowhere."""
        self.folder, self.basis = folder, basis

    def of(self, *what: Any) -> "Cache":
        """The parts of one attack, named by its settings."""
        return Cache(self.folder, json.dumps([self.basis, *what], sort_keys=True, default=str))

    def get(self, name: str) -> dict[str, np.ndarray] | None:
        """The arrays of a part, or None if it has not been finished."""
        if self.folder is None or not self._path(name).exists():
            return None
        try:
            with np.load(self._path(name), allow_pickle=False) as stored:
                return {key: stored[key] for key in stored.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile):
            return None  # damaged: it is made again

    def put(self, name: str, **arrays: Any) -> None:
        """Keep the arrays of a finished part."""
        if self.folder is None:
            return
        with atomic(self._path(name)) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self.basis}\x1f{name}".encode()).hexdigest()[:24]
        return self.folder / f"{digest}.npz"


def identity(model: nn.Module, part: Part, device: torch.device) -> str:
    """Digest of a network in eval mode, and of the images with their labels that it is asked about.

    A network is its weights, the code of its modules, and what it computes: its outputs and input
    gradients for the first images, which catch what no list of settings and files can.
    """
    digest = hashlib.sha256(_code_of(model).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.as_bytes(value))
    for value in (part.x_NCHW, part.y_N, *_behaviour(model, part, device)):
        digest.update(weights.as_bytes(value))
    return digest.hexdigest()[:24]


def _code_of(model: nn.Module) -> str:
    """Digest of the code of all layers that are not torch's own."""
    found = {type(module).__module__ for module in model.modules()}
    return source_code.digest(*sorted(n for n in found if n.partition(".")[0] != "torch"))


def _behaviour(model: nn.Module, part: Part, device: torch.device) -> list[Tensor]:
    """Logits and input gradients; random numbers are drawn from a fixed seed and put back."""
    if not len(part):
        return []
    x = part.x_NCHW[:LOOKED_AT].to(device, copy=True).requires_grad_(True)
    before = randomness.state(device)
    randomness.seed(0)
    try:
        with torch.enable_grad(), perturb.no_parameter_gradients(model):
            logits = model(x)
            if not logits.requires_grad:
                return [logits]
            return [logits, *torch.autograd.grad(logits.logsumexp(1).sum() + logits[:, 0].sum(), x)]
    finally:
        randomness.restore(before, device)


def no_surrogate(name: str) -> nn.Module:
    """What an attack gets that asks for another network where there is none."""
    raise LookupError(f"no network '{name}' here")


@dataclass(frozen=True)
class AttackContext:
    """The adversary of one attack run. `seed` decides all its random draws.

    `report(text)` may be called between parts of a long attack. `cache` keeps finished parts.
    `surrogate(name)` is another network of the study, in eval mode, for attacks that transfer.
    `images` are all test images of the evaluation, those that the model gets wrong too.
    """

    norm: str
    eps: float
    seed: int
    batch_size: int
    device: torch.device
    report: Callable[[str], None] = print
    cache: Cache = Cache(None)  # noqa: RUF009 (it has no state)
    surrogate: Callable[[str], nn.Module] = no_surrogate
    images: Tensor | None = None


class Picture(NamedTuple):
    """An adversarial image x_CHW and the class that the network took it for."""

    image: Tensor
    taken_for: int


@dataclass(frozen=True)
class Outcome:
    """What an attack found.

    components: for each part, in the order run, which images are robust to it and to all parts
        before it (bool N); the last is the attack's result.
    settings: the fields steps, restarts and version of a result row, where they apply.
    warnings: why the attack itself may be unreliable, in words.
    max_perturbation: largest distance of an adversarial image in the norm of the threat, or None.
    distances: for an attack that looks for the smallest perturbation, its length for each image
        (float N, inf where none was found).
    pictures: adversarial versions of some of the first images, by their index.
    earlier_seconds: what an earlier, killed run had spent on the parts that were taken over.
    """

    components: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    max_perturbation: float | None = None
    nan_count: int = 0
    distances: Tensor | None = None
    pictures: dict[int, Picture] = field(default_factory=dict)
    earlier_seconds: float = 0.0

    def arrays(self, seconds: float) -> dict[str, np.ndarray]:
        """All of it, to be kept; `seconds` is what the attack took."""
        words = {
            "settings": self.settings,
            "warnings": self.warnings,
            "max_perturbation": self.max_perturbation,
            "nan_count": self.nan_count,
            "components": list(self.components),
            "seconds": seconds,
        }
        found = {f"flags{i}": f.cpu().numpy() for i, f in enumerate(self.components.values())}
        if self.distances is not None:
            found["distances"] = self.distances.numpy()
        return {"words": np.array(json.dumps(words)), **found, **_arrays_of(self.pictures)}

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray]) -> "Outcome":
        """What `arrays` was made from; all its seconds are earlier ones."""
        words = json.loads(str(arrays["words"]))
        names, seconds = words.pop("components"), words.pop("seconds")
        lengths = arrays.get("distances")
        return cls(
            {name: torch.from_numpy(arrays[f"flags{i}"]) for i, name in enumerate(names)},
            **words,
            distances=None if lengths is None else torch.from_numpy(lengths),
            pictures=_pictures_of(arrays),
            earlier_seconds=seconds,
        )


def outcome_from_distances(distances: Tensor, eps: float, settings: dict[str, Any]) -> Outcome:
    """The outcome of an attack that found the smallest perturbations (float N, inf: none)."""
    robust = distances > eps
    return Outcome(
        {"all": robust},
        settings,
        max_perturbation=max(distances[~robust].tolist(), default=0.0),
        distances=distances,
    )


def _arrays_of(pictures: dict[int, Picture]) -> dict[str, np.ndarray]:
    images = [picture.image for picture in pictures.values()]
    return {
        "pictured": np.array(list(pictures), dtype=np.int64),
        "taken_for": np.array([p.taken_for for p in pictures.values()], dtype=np.int64),
        "pictures": torch.stack(images).half().numpy() if images else np.zeros(0, np.float16),
    }


def _pictures_of(arrays: dict[str, np.ndarray]) -> dict[int, Picture]:
    images = torch.from_numpy(arrays["pictures"]).float()
    found = map(Picture, images, arrays["taken_for"].tolist())
    return dict(zip(arrays["pictured"].tolist(), found, strict=True))


class Tally:
    """Which images are still robust while attacks go over them, and what they did to them."""

    def __init__(self, x_NCHW: Tensor, y_N: Tensor, context: AttackContext) -> None:
        self.x_NCHW, self.y_N, self.context = x_NCHW, y_N, context
        self.robust = torch.ones(len(y_N), dtype=torch.bool)
        self.largest, self.nans = 0.0, 0
        self.began, self.earlier = time.monotonic(), 0.0
        self.pictures: dict[int, Picture] = {}

    def attack(
        self,
        model: nn.Module,
        craft: Callable[[Tensor, Tensor, Tensor], Tensor],
        among: Tensor | None = None,
    ) -> None:
        """Judge craft(x, y, index) of batch after batch, of all images or those `among` (int)."""
        context = self.context
        among = torch.arange(len(self.y_N)) if among is None else among

        def work(where: slice) -> None:
            index = among[where]
            x, y = self.x_NCHW[index].to(context.device), self.y_N[index].to(context.device)
            self.judge(model, index, craft(x, y, index))

        in_batches(len(among), context.batch_size, work, context.report)

    def judge(self, model: nn.Module, where: slice | Tensor, adversarial: Tensor) -> None:
        """Look whether the model is wrong on adversarial versions of the images at `where`."""
        index = torch.arange(len(self.y_N))[where]
        with torch.no_grad():
            predicted = model(adversarial).argmax(1).cpu()
        broken = (predicted != self.y_N[index]).nonzero().squeeze(1)
        found = adversarial.detach().cpu()
        change = length(found - self.x_NCHW[index], self.context.norm)
        self.nans += int(found.isnan().sum())
        self.largest = max([self.largest, *change.nan_to_num(0.0).tolist()])
        for i in broken.tolist():
            if int(index[i]) < PICTURES:
                self.pictures[int(index[i])] = Picture(found[i], int(predicted[i]))
        self.robust[index[broken]] = False

    def arrays(self) -> dict[str, np.ndarray]:
        """All that was found so far, to be kept."""
        return {
            "robust": self.robust.numpy(),
            "numbers": np.array([self.largest, self.nans, self.seconds()], dtype=np.float64),
            **_arrays_of(self.pictures),
        }

    def take(self, arrays: dict[str, np.ndarray]) -> None:
        """What an earlier run has found, in the place of what is here."""
        self.robust = torch.from_numpy(arrays["robust"])
        largest, nans, self.earlier = arrays["numbers"].tolist()
        self.largest, self.nans = largest, int(nans)
        self.pictures = _pictures_of(arrays)
        self.began = time.monotonic()

    def seconds(self) -> float:
        """What has been spent so far, by earlier runs too."""
        return self.earlier + time.monotonic() - self.began

    def outcome(
        self,
        settings: dict[str, Any],
        components: dict[str, Tensor] | None = None,
        warnings: list[str] | None = None,
    ) -> Outcome:
        """The outcome of the attack."""
        return Outcome(
            components or {"all": self.robust},
            settings,
            warnings or [],
            max_perturbation=self.largest,
            nan_count=self.nans,
            pictures=self.pictures,
            earlier_seconds=self.earlier,
        )


def random_search(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: str,
    eps: float,
    queries: int,
    restarts: int,
    seed: int,
) -> Tensor:
    """Square attack with AutoAttack's settings; images where it failed come back as they were."""
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        search = SquareAttack(
            model,
            p_init=0.8,
            n_queries=queries,
            eps=eps,
            norm=norm,
            n_restarts=restarts,
            seed=seed,
            verbose=False,
            device=x.device,
            resc_schedule=False,
        )
        with torch.no_grad():
            return search.perturb(x, y)


def length(change_NCHW: Tensor, norm: str) -> Tensor:
    """Length of each perturbation in a norm, "Linf" or "L2" (float N)."""
    flat = change_NCHW.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


class AttackProgress:
    """Images done, still robust, seconds and an estimate of the rest.

    A bar on a terminal; in a log a plain line every few seconds and one at the end.
    """

    def __init__(self, name: str, total: int, report: Callable[[str], None]) -> None:
        self.name, self.total, self.report = name, total, report
        self.began = self.told = time.monotonic()
        self.bar = tqdm(total=total, desc=name, unit="image", disable=None, leave=False)

    def update(self, done: int, robust: int) -> None:
        """So many images are through, and so many of all are still robust."""
        self.bar.update(done - self.bar.n if not self.bar.disable else 0)
        self.bar.set_postfix_str(f"{robust} robust")
        now = time.monotonic()
        if self.bar.disable and done < self.total and now - self.told > SECONDS_BETWEEN_LINES:
            self.told = now
            rest = (now - self.began) / max(done, 1) * (self.total - done)
            self.report(
                f"{self.name}: {done} of {self.total} images, {robust} still robust, "
                f"{now - self.began:.0f} s, about {rest:.0f} s left"
            )

    def close(self, robust: int, of: int) -> None:
        """The last line."""
        self.bar.close()
        seconds = time.monotonic() - self.began
        self.report(f"{self.name}: {robust} of {of} still robust, {seconds:.1f} s")


def in_batches(
    count: int, size: int, work: Callable[[slice], None], report: Callable[[str], None]
) -> None:
    """Call work(range) for one range of images after the other.

    Where memory runs out, ranges are halved from there on, with a line in the log.
    """
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            work(slice(start, stop))
        except RuntimeError as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size = max(1, min(size, stop - start) // 2)
            _forget_memory()
            report(f"out of memory: batches of {size} images from here on")
        else:
            start = stop


def _forget_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def correct_flags(
    model: nn.Module,
    part: Part,
    size: int,
    device: torch.device,
    report: Callable[[str], None] = print,
) -> Tensor:
    """Which images the model classifies correctly (bool N, on the CPU)."""
    flags = torch.zeros(len(part), dtype=torch.bool)

    def look(where: slice) -> None:
        with torch.no_grad():
            predicted = model(part.x_NCHW[where].to(device)).argmax(1).cpu()
        flags[where] = predicted == part.y_N[where]

    in_batches(len(part), size, look, report)
    return flags
