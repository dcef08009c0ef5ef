"""What only a whole study shows to be wrong, said before anything is trained. No torch in here.

Every check yields lines `key = value: what was expected`.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

from robsparse.base.errors import UsageError, nearest
from robsparse.schema.fields import radius_fault
from robsparse.schema.imagesets import Description
from robsparse.schema.sections import AttackParams, Grid, Training
from robsparse.study.faults import show
from robsparse.study.study import Study


def faults(study: Study) -> list[str]:
    """All faults of a study whose parts are valid, one a line.

    Raises UsageError where a budget does not suit a method or two blocks contradict each other.
    """
    checks = (
        _attack_radii,
        _training_radii,
        _extra_images,
        _data,
        _batches,
        _archs,
        _starts,
        _names,
        _labels,
        _tables,
        _published,
    )
    found = [line for check in checks for line in check(study)]
    # The networks themselves can only be listed where all that decides them is right.
    return found or [line for check in (_warm_ups, _surrogates, _places) for line in check(study)]


def missing_data(study: Study) -> list[str]:
    """A line for each data set that has to be there and is not.

    Apart from the faults: where results are collected and drawn, nobody needs the images.
    """
    found = []
    for name, params in study.datasets.items():
        for key in study.entry("dataset", name).literals.get("NEEDED", ()):
            if not os.path.exists(getattr(params, key)):
                found.append(f"datasets.{name}.{key} = {show(getattr(params, key))}")
        if os.path.isfile(getattr(params, "data_dir", ".")):
            found.append(f"datasets.{name}.data_dir = {show(params.data_dir)}")
    return [f"{line}: expected a file or folder of images that is there" for line in found]


def _said(key: str, value: Any, expected: str) -> str:
    return f"{key} = {show(value)}: expected {expected}"


def _trainings(study: Study) -> Iterator[tuple[str, Training, list[Grid]]]:
    """Every way in which networks are trained: the key of its settings, these, and its blocks."""
    shared = [block for block in study.blocks() if block.training is None]
    if shared:
        yield "training", study.training, shared
    for block in study.blocks():
        if block.training is not None:
            yield f"{study.key_of(block)}.training", block.training, [block]


def _attack_radii(study: Study) -> Iterator[str]:
    """Attacks whose eps is none in their norm."""
    for name, params in study.evaluation.attacks.items():
        if not isinstance(params, AttackParams):
            continue
        key, norm = f"evaluation.attacks.{name}.eps", params.norm or study.threat.norm
        if params.eps is None and norm != study.threat.norm:
            yield f"{key}: missing, expected the radius in {norm}; that of the threat is another's"
        elif fault := radius_fault(norm, params.eps or study.threat.eps):
            yield f"{key} = {params.eps}: {fault}"


def _training_radii(study: Study) -> Iterator[str]:
    """Radii and crafting steps that are none in the norm, and steps that leave the ball.

    One step may be twice eps long, so that it crosses the ball (fast adversarial training takes
    1.25 eps); the steps of several are at most eps.
    """
    for key, training, _ in _trainings(study):
        if training.eps and (fault := radius_fault(study.threat.norm, training.eps)):
            yield f"{key}.eps = {training.eps}: {fault}"
            continue
        eps, crafting = study.threat.adjusted(training).eps, training.crafting
        longest = 2 * eps if crafting.steps == 1 else eps
        where = f"{key}.crafting.step_size"
        if fault := radius_fault(study.threat.norm, crafting.step_size):
            yield f"{where} = {crafting.step_size}: {fault}"
        elif crafting.step_size > longest:
            yield _said(
                where,
                crafting.step_size,
                f"at most {'twice ' if crafting.steps == 1 else ''}the eps that is trained "
                f"against; nearest match: {longest:.6g}",
            )


def _extra_images(study: Study) -> Iterator[str]:
    """Robust self-training without its extra images."""
    for key, training, blocks in _trainings(study):
        path = training.rst_file
        wanted = any("rst" in block.objectives for block in blocks)
        if wanted and (path is None or not os.path.isfile(path)):
            yield (
                f"{key}.rst_file = {show(path)}: the objective 'rst' needs a file of "
                "pseudo-labelled extra images, an npz with the arrays 'images' and 'labels'; the "
                "authors took theirs from TinyImages, which was withdrawn, so there is none to "
                "download"
            )


def _data(study: Study) -> Iterator[str]:
    """Too little data for what is held out and attacked."""
    for name in study.datasets:
        if (found := _describe(study, name)) is None:
            continue
        each, held_out = found.classes or 1, found.validation_examples
        if found.train_examples < each or held_out < each:
            total = found.train_examples + held_out
            key = f"datasets.{name}.validation_examples"
            expected = f"{each} to {total - each} of the {total} images beside those for tests"
            yield _said(key, held_out, expected)
        elif study.evaluation.n_examples > found.test_examples:
            yield _said(
                "evaluation.n_examples",
                study.evaluation.n_examples,
                f"at most the test images of '{name}'; nearest match: {found.test_examples}",
            )


def _describe(study: Study, dataset: str) -> Description | None:
    """What is known of a data set without reading it."""
    params = study.datasets[dataset]
    return params.description() if hasattr(params, "description") else None


def _batches(study: Study) -> Iterator[str]:
    """Batches larger than the data, or that an objective cannot use."""
    for key, training, blocks in _trainings(study):
        size, where = training.batch_size, f"{key}.batch_size"
        if size == 1 and any("mat" in block.objectives for block in blocks):
            expected = "at least 2 for the objective 'mat', which attacks half of a batch"
            yield _said(where, 1, f"{expected}; nearest match: 2")
        for name in dict.fromkeys(name for block in blocks for name in block.datasets):
            found = _describe(study, name)
            if found is not None and 0 < found.train_examples < size:
                most = found.train_examples
                expected = f"at most the {most} training images of '{name}'; nearest match: {most}"
                yield _said(where, size, expected)


def _archs(study: Study) -> Iterator[str]:
    """Architectures that cannot take the images that they are to be trained on."""
    pairs = [pair for block in study.blocks() for pair in product(block.archs, block.datasets)]
    pairs += [(m.arch, m.dataset) for m in study.models.values() if m.arch]
    for arch, dataset in dict.fromkeys(pairs):
        if (found := _describe(study, dataset)) is None:
            continue
        params, (channels, *sides) = study.archs[arch], found.image_shape
        smallest = study.entry("arch", arch).literals.get("SMALLEST", 1)
        if isinstance(smallest, dict):
            smallest = smallest[study.base("arch", arch)]
        if min(sides) < smallest:
            height, width = sides
            yield (
                f"archs.{arch}: expected images of at least {smallest}x{smallest} pixels, those of "
                f"'{dataset}' have {height}x{width}"
            )
        for key in ("mean", "std"):
            values = getattr(params, key, None)
            if values is not None and len(values) != channels:
                expected = f"a value for each of the {channels} channels of '{dataset}'"
                yield _said(f"archs.{arch}.{key}", values, expected)


def _starts(study: Study) -> Iterator[str]:
    """Methods that start from networks of a method that prunes."""
    for name in study.methods:
        start = study.start_method(name)
        if start is not None and not study.is_dense(start):
            path = study.entry("method", name).path
            yield f"{path}: STARTS_FROM = '{start}': expected a method that does not prune"


def _names(study: Study) -> Iterator[str]:
    """Names that differ in case only: one folder on some file systems."""
    sections = {
        "datasets": study.datasets,
        "archs": study.archs,
        "methods": [*study.methods, *study.models],
        "evaluation.attacks": study.evaluation.attacks,
        "tables": [table.name for table in study.tables],
    }
    for key, names in sections.items():
        for name, other in _alike(names, str.lower):
            yield f"{key}: '{name}' and '{other}': expected names that differ in more than case"


def _labels(study: Study) -> Iterator[str]:
    """Two parts that tables and plots could not tell apart."""
    for kind, names in (
        ("dataset", study.datasets),
        ("arch", study.archs),
        ("method", [*study.methods, *study.models]),
        ("attack", study.evaluation.attacks),
    ):
        key = "evaluation.attacks" if kind == "attack" else f"{kind}s"
        for name, other in _alike(names, lambda name, kind=kind: study.label(kind, name)):
            where = f"models.{name}" if name in study.models else f"{key}.{name}"
            label = study.label(kind, name)
            yield _said(f"{where}.label", label, f"another label than that of '{other}'")


def _alike(names: Iterable[str], look: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Each name that looks like an earlier one, with that one."""
    first: dict[str, str] = {}
    for name in names:
        if look(name) in first:
            yield name, first[look(name)]
        first.setdefault(look(name), name)


def _tables(study: Study) -> Iterator[str]:
    """Tables that ask for what the study does not have."""
    for index, table in enumerate(study.tables):
        known: dict[str, Iterable[str]] = {
            "datasets": study.datasets,
            "archs": study.archs,
            "methods": [*study.methods, *study.models],
            "attacks": study.evaluation.attacks,
        }
        asked = [(key, name) for key in known for name in getattr(table, key)]
        known["selection"] = study.evaluation.selections
        for key, name in [*asked, ("selection", table.selection)]:
            if name not in known[key]:
                choices = f"one of the study's: {', '.join(known[key])}"
                yield _said(f"tables.{index}.{key}", name, f"{choices}{nearest(name, known[key])}")


def _published(study: Study) -> Iterator[str]:
    """Files of published numbers that are not there."""
    for index, table in enumerate(study.tables):
        for name in table.published:
            if not os.path.isfile(name):
                yield f"tables.{index}.published = {show(name)}: no such file"


def _warm_ups(study: Study) -> Iterator[str]:
    """Warm-ups of eps that outlast the first stage of a network that is trained from scratch."""
    places = {id(training): key for key, training, _ in _trainings(study)}
    said = set()
    for cell in study.cells():
        if study.is_external(cell.method) or study.starting_cell(cell):
            continue
        epochs = next((fit.epochs for fit in study.fits(cell).values()), None)
        training = study.training_of(cell)
        warmup, key = training.crafting.eps_warmup, places[id(training)]
        if epochs is not None and warmup > epochs and (key, cell.method) not in said:
            said.add((key, cell.method))
            expected = f"at most the {epochs} epochs of the first stage of '{cell.method}'"
            yield _said(f"{key}.crafting.eps_warmup", warmup, expected)


def _surrogates(study: Study) -> Iterator[str]:
    """Attacks without a network to transfer from."""
    for cell in study.cells():
        for selection in study.evaluation.selections:
            try:
                study.surrogates(cell, selection)
            except UsageError as error:
                yield str(error)
                return


def _places(study: Study) -> Iterator[str]:
    """Tables that put two networks in one place."""
    for index, table in enumerate(study.tables):
        try:
            study.cells_of(table)
        except UsageError as error:
            yield f"tables.{index}: {error}"
