"""Compares our AutoAttack with one call of the stock package: image for image, and in seconds.

    python benchmarks/agreement.py shipped --images FOLDER --eps 0.25/255 --n 16
    python benchmarks/agreement.py config/quick.yaml --cell KEY

`shipped` is the CIFAR-10 ResNet-18 that comes with the package; FOLDER holds test/<class>/ images.
A cell is a trained network of a study, attacked as the study says; more images than it has for
tests are taken from the others. Ours attacks the folded view, as `robsparse evaluate` does, the
stock package the network. Both run with the same seed, batch size and images (those that are
classified correctly), in turn.
"""

import argparse
import time
from pathlib import Path

import pyautoattack
import torch
from pyautoattack import AutoAttack
from torch import nn

from robsparse import datasets, models
from robsparse.base import registry
from robsparse.compute.machine import device_name, pick_device, prepare
from robsparse.datasets import Part
from robsparse.evaluation.attacks import AttackContext
from robsparse.evaluation.job import first_examples
from robsparse.evaluation.tally import correct_flags
from robsparse.fast import folding
from robsparse.networks import construct, weights
from robsparse.schema.fields import radius
from robsparse.study import loading
from robsparse.study.cells import Cell, Layout, derive_seed

SHIPPED = Path(pyautoattack.__file__).parent / "examples" / "model_test.pt"


def main() -> None:
    arguments = _parser().parse_args()
    prepare(arguments.threads)
    device = pick_device(arguments.device)
    if arguments.source == "shipped":
        model, part = _shipped(arguments)
        eps, seed, batch_size = radius(arguments.eps), 0, 250
    else:
        study = loading.load(arguments.source)
        model, part = _of_study(study, Cell.parse(arguments.cell), arguments)
        eps, batch_size = study.threat.eps, study.evaluation.batch_size
        seed = derive_seed("attack", "autoattack", study.evaluation.seed) % 2**31
    model = model.to(device).eval()
    right = correct_flags(model, part, batch_size, device)
    part = Part(part.x_NCHW[right], part.y_N[right])
    print(f"{len(right)} images, {len(part)} classified correctly, eps {eps:.5g}, AutoAttack")
    threat = AttackContext("Linf", eps, seed, batch_size, device, report=lambda text: None)
    module = registry.load("attack", "autoattack")
    view = folding.folded_view(model, part.x_NCHW[:1].to(device))
    ours, our_seconds = _timed(
        lambda: module.run(view, part.x_NCHW, part.y_N, module.Params(), threat).components
    )
    theirs, their_seconds = _timed(lambda: _stock(model, part, threat))
    final = list(ours.values())[-1]
    apart = (final != theirs).nonzero().squeeze(1).tolist()
    print(f"survivors: ours {int(final.sum())}, stock {int(theirs.sum())}")
    print(f"images that differ: {apart or 'none'} ({1 - len(apart) / len(part):.2%} agree)")
    print(f"seconds: ours {our_seconds:.1f}, stock {their_seconds:.1f}", end="")
    print(f", ratio {their_seconds / our_seconds:.2f} on {device_name(device)}")


def _timed(work):
    began = time.perf_counter()
    found = work()
    return found, time.perf_counter() - began


def _stock(model: nn.Module, part: Part, threat: AttackContext) -> torch.Tensor:
    attack = AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=threat.seed, device=threat.device
    )
    _, labels = attack.run_standard_evaluation(part.x_NCHW, part.y_N, batch_size=threat.batch_size)
    return labels == part.y_N


def _shipped(arguments: argparse.Namespace) -> tuple[nn.Module, Part]:
    model = models.build("resnet18", registry.entry("arch", "resnet18").params(), (3, 32, 32), 10)
    weights.load_into(model, SHIPPED, "order")
    params = registry.entry("dataset", "imagefolder").params(data_dir=arguments.images)
    test = datasets.load("imagefolder", params).test
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: arguments.n]
    return model, Part(test.x_NCHW[chosen], test.y_N[chosen])


def _of_study(
    study: loading.Study, cell: Cell, arguments: argparse.Namespace
) -> tuple[nn.Module, Part]:
    splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
    layout = Layout(arguments.results / study.study)
    model = construct.with_weights(study, cell, splits, layout.model(cell, "best_val"))
    n = arguments.n or study.evaluation.n_examples
    if n <= len(splits.test):
        return model, first_examples(splits.test, n, splits.classes)
    parts = (splits.test, splits.validation, splits.train)
    x_NCHW, y_N = (torch.cat([getattr(p, name) for p in parts]) for name in ("x_NCHW", "y_N"))
    return model, Part(x_NCHW[:n], y_N[:n])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="'shipped', or a study file")
    parser.add_argument("--cell", help="network of the study")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--images", help="folder of real images for 'shipped'")
    parser.add_argument("--eps", default="0.5/255", help="for 'shipped'")
    parser.add_argument("--n", type=int, help="how many images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    return parser


if __name__ == "__main__":
    main()
