"""Checks of a whole study before anything is trained: settings that are only wrong together.

Every check yields lines of the form `key = value: what was expected`. Imports no torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

from robsparse.base.errors import UsageError, nearest_match
from robsparse.schema.fields import least_sparsity, radius_error
from robsparse.schema.imagesets import Description, Images
from robsparse.schema.threat import AttackParams
from robsparse.schema.training import Training
from robsparse.study.cells import Cell
from robsparse.study.messages import show
from robsparse.study.parts import Block, PartKind, Parts
from robsparse.study.planned import trained_against
from robsparse.study.study import Study


def errors_in_parts(parts: Parts) -> list[str]:
    """Errors in the combination of the parts of a study, one line for each."""
    checks = (
        _attack_radii,
        _corruptions,
        _training_radii,
        _extra_images,
        _label_smoothing,
        _synthetic_images,
        _data,
        _batches,
        _archs,
        _starts,
        _patterns,
        _names,
        _labels,
        _tables,
        _published,
    )
    return [line for check in checks for line in check(parts)]


def errors_in_cells(study: Study, cells: Iterable[Cell]) -> list[str]:
    """Errors in some networks of a study with valid parts, one line for each."""
    return [line for check in (_warm_ups, _surrogates) for line in check(study, cells)]


def errors_in_tables(study: Study) -> list[str]:
    """Tables with two networks in one field, one line for each."""
    found = []
    for index, table in enumerate(study.tables):
        try:
            study.cells_of(table)
        except UsageError as error:
            found.append(f"tables.{index}: {error}")
    return found


def missing_data(study: Study) -> list[str]:
    """A line for each data set with missing files.

    This check is separate from the others, because collecting and drawing results needs no images.
    """
    found = []
    for name, params in study.datasets.items():
        for key in study.entry("dataset", name).literals.get("NEEDED", ()):
            if not os.path.exists(getattr(params, key)):
                found.append(f"datasets.{name}.{key} = {show(getattr(params, key))}")
        folder = getattr(params, "data_dir", ".")
        own = "data_dir" in type(params).model_fields and folder != _default_folder(params)
        if os.path.isfile(folder) or (own and not os.path.exists(folder)):
            found.append(f"datasets.{name}.data_dir = {show(folder)}")
    lines = [f"{line}: expected an existing file or folder of images" for line in found]
    return list(dict.fromkeys(lines))


def _default_folder(params: Images) -> str | None:
    """The folder of a data set that is downloaded; it is made at the download."""
    return type(params).model_fields["data_dir"].default


def absent_folders(study: Study) -> list[str]:
    """A line for each data set whose default folder is not there: its images are not there yet."""
    return [
        f"datasets.{name}: its folder {show(folder)} is not there yet"
        for name, params in study.datasets.items()
        if not os.path.exists(folder := getattr(params, "data_dir", "."))
    ]


def _line(key: str, value: Any, expected: str) -> str:
    return f"{key} = {show(value)}: expected {expected}"


def _trainings(parts: Parts) -> Iterator[tuple[str, Training, list[Block]]]:
    """All training settings of the study: their key, the settings, and the blocks that use them."""
    shared = [block for block in parts.blocks if not block.own_training]
    if shared:
        yield shared[0].training_key, parts.training, shared
    for block in parts.blocks:
        if block.own_training:
            yield block.training_key, block.training, [block]


def _attack_radii(parts: Parts) -> Iterator[str]:
    """Attacks with an eps that is missing or too large for their norm."""
    for name, params in parts.attack_params.items():
        if not isinstance(params, AttackParams):
            continue
        key, norm = f"evaluation.attacks.{name}.eps", params.norm or parts.threat.norm
        if params.eps is None and norm != parts.threat.norm:
            yield f"{key}: missing, expected a radius in {norm}; the threat has another norm"
        elif error := radius_error(norm, params.eps or parts.threat.eps):
            yield f"{key} = {params.eps}: {error}"


def _corruptions(parts: Parts) -> Iterator[str]:
    """Folders of corrupted images for no data set of the study, or that are not there."""
    chosen = parts.evaluation.corruptions
    for name, folder in chosen.folders.items() if chosen else ():
        key = f"evaluation.corruptions.folders.{name}"
        if name not in parts.datasets:
            known = ", ".join(parts.datasets)
            nearest = nearest_match(name, parts.datasets)
            yield f"{key}: expected a data set of the study: {known}{nearest}"
        elif not os.path.isfile(os.path.join(folder, "labels.npy")):
            yield _line(key, folder, "a folder with labels.npy and a file for each corruption")


def _training_radii(parts: Parts) -> Iterator[str]:
    """Radii and step sizes of training that are too large.

    If crafting has one step, its size is at most 2 eps, which is the diameter of the ball (fast
    adversarial training uses 1.25 eps). If it has several steps, the size is at most eps.
    """
    for key, training, _ in _trainings(parts):
        if training.eps and (error := radius_error(parts.threat.norm, training.eps)):
            yield f"{key}.eps = {training.eps}: {error}"
            continue
        eps, crafting = trained_against(parts.threat, training).eps, training.crafting
        longest = 2 * eps if crafting.steps == 1 else eps
        where = f"{key}.crafting.step_size"
        if error := radius_error(parts.threat.norm, crafting.step_size):
            yield f"{where} = {crafting.step_size}: {error}"
        elif crafting.step_size > longest:
            yield _line(
                where,
                crafting.step_size,
                f"at most {'twice ' if crafting.steps == 1 else ''}the eps of training; "
                f"nearest match: {longest:.6g}",
            )


def _extra_images(parts: Parts) -> Iterator[str]:
    """Robust self-training without a file of extra images."""
    for key, training, blocks in _trainings(parts):
        path = training.rst_file
        wanted = any("rst" in block.objectives for block in blocks)
        if wanted and (path is None or not os.path.isfile(path)):
            yield (
                f"{key}.rst_file = {show(path)}: the objective 'rst' needs a file of "
                "pseudo-labelled extra images, an npz with the arrays 'images' and 'labels'; there "
                "is no download, because the authors used TinyImages, which was withdrawn"
            )


def _synthetic_images(parts: Parts) -> Iterator[str]:
    """Synthetic images without a file, or with the objective rst, which has other images."""
    for key, training, blocks in _trainings(parts):
        path, where = training.synthetic_file, f"{key}.synthetic_file"
        if path is not None and not os.path.isfile(path):
            yield _line(where, path, "an npz file with the arrays 'image' and 'label'")
        elif path is not None and any("rst" in block.objectives for block in blocks):
            yield _line(where, path, "none for the objective 'rst', which has its rst_file")


def _label_smoothing(parts: Parts) -> Iterator[str]:
    """Label smoothing with MART: there is no published loss with both."""
    for key, training, blocks in _trainings(parts):
        if training.label_smoothing and any("mart" in block.objectives for block in blocks):
            value = training.label_smoothing
            yield _line(f"{key}.label_smoothing", value, "0 for the objective 'mart'")


def _data(parts: Parts) -> Iterator[str]:
    """Data sets with too few images for training, validation or evaluation."""
    trained_on = {name for block in parts.blocks for name in block.datasets}
    for name in parts.datasets:
        if (found := _describe(parts, name)) is None:
            continue
        each, held_out = found.classes or 1, found.validation_examples
        wanted, most = getattr(parts.datasets[name], "train_examples", None), found.train_examples
        if name in trained_on and not most + held_out:
            yield f"datasets.{name}: no training images, expected some: the grid trains on it"
        elif wanted is not None and not each <= wanted <= most:
            few = f"at least one for each of the {each} classes"
            expected = few if wanted < each else f"at most the {most} images that are not held out"
            yield _line(f"datasets.{name}.train_examples", wanted, expected)
        elif name in trained_on and (most < each or held_out < each):
            shared = getattr(parts.datasets[name], "train_on_validation", False)
            total = most + (0 if shared else held_out)
            key = f"datasets.{name}.validation_examples"
            expected = f"{each} to {total - each} of the {total} images that are not for tests"
            yield _line(key, held_out, expected)
        elif parts.evaluation.n_examples > found.test_examples:
            yield _line(
                "evaluation.n_examples",
                parts.evaluation.n_examples,
                f"at most the test images of '{name}'; nearest match: {found.test_examples}",
            )


def _describe(parts: Parts, dataset: str) -> Description | None:
    """Sizes of a data set that are known without reading it, or None."""
    params = parts.datasets[dataset]
    return params.description() if hasattr(params, "description") else None


def _batches(parts: Parts) -> Iterator[str]:
    """Batches that are larger than the data set, or too small for an objective."""
    for key, training, blocks in _trainings(parts):
        size, where = training.batch_size, f"{key}.batch_size"
        if size == 1 and any("mat" in block.objectives for block in blocks):
            expected = "at least 2 for the objective 'mat', which attacks half of a batch"
            yield _line(where, 1, f"{expected}; nearest match: 2")
        for name in dict.fromkeys(name for block in blocks for name in block.datasets):
            found = _describe(parts, name)
            if found is not None and 0 < found.train_examples < size:
                most = found.train_examples
                expected = f"at most the {most} training images of '{name}'; nearest match: {most}"
                yield _line(where, size, expected)


def _archs(parts: Parts) -> Iterator[str]:
    """Architectures that do not fit the images of their data sets."""
    pairs = [pair for block in parts.blocks for pair in product(block.archs, block.datasets)]
    pairs += [(m.arch, m.dataset) for m in parts.models.values() if m.arch]
    for arch, dataset in dict.fromkeys(pairs):
        if (found := _describe(parts, dataset)) is None:
            continue
        params, (channels, *sides) = parts.archs[arch], found.image_shape
        smallest = parts.entry("arch", arch).literals.get("SMALLEST", 1)
        if isinstance(smallest, dict):
            smallest = smallest[parts.base("arch", arch)]
        if min(sides) < smallest:
            height, width = sides
            yield (
                f"archs.{arch}: expected images of at least {smallest}x{smallest} pixels, but "
                f"'{dataset}' has images of {height}x{width}"
            )
        for key in ("mean", "std"):
            values = getattr(params, key, None)
            if values is not None and len(values) != channels:
                expected = f"a value for each of the {channels} channels of '{dataset}'"
                yield _line(f"archs.{arch}.{key}", values, expected)


def _starts(parts: Parts) -> Iterator[str]:
    """Methods that start from the networks of a method that prunes."""
    for name in parts.methods:
        start = parts.start_method(name)
        if start is not None and not parts.is_dense(start):
            path = parts.entry("method", name).path
            yield f"{path}: STARTS_FROM = '{start}': expected a method that does not prune"


def _patterns(parts: Parts) -> Iterator[str]:
    """Sparsities with more nonzero weights than the N:M pattern of a method allows."""
    for block in parts.blocks:
        for name in block.methods:
            params = block.params.get(name, parts.methods[name])
            pattern = getattr(params, "pattern", None)
            least = least_sparsity(pattern) if pattern else Fraction(0)
            if any(Fraction(str(sparsity)) < least for sparsity in block.sparsities):
                expected = f"at least {float(least):.4g} for '{name}' with the pattern {pattern}"
                yield _line(f"{block.key}.sparsities", list(block.sparsities), expected)


def _names(parts: Parts) -> Iterator[str]:
    """Names that differ only in upper and lower case: some file systems give them one folder."""
    sections = {
        "datasets": parts.datasets,
        "archs": parts.archs,
        "methods": [*parts.methods, *parts.models],
        "evaluation.attacks": parts.attack_params,
        "tables": [table.name for table in parts.tables],
    }
    for key, names in sections.items():
        for name, other in _alike(names, str.lower):
            yield f"{key}: '{name}' and '{other}': expected names that differ in lower case too"


def _labels(parts: Parts) -> Iterator[str]:
    """Two parts with the same label in tables and plots."""
    named: dict[PartKind, Iterable[str]] = {
        "dataset": parts.datasets,
        "arch": parts.archs,
        "method": [*parts.methods, *parts.models],
        "attack": parts.attack_params,
    }
    for kind, names in named.items():
        key = "evaluation.attacks" if kind == "attack" else f"{kind}s"
        for name, other in _alike(names, partial(parts.label, kind)):
            where = f"models.{name}" if name in parts.models else f"{key}.{name}"
            label = parts.label(kind, name)
            yield _line(
                f"{where}.label", label, f"a label that differs from the label of '{other}'"
            )


def _alike(names: Iterable[str], look: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """Each name with the same form (by `look`) as an earlier name, with that earlier name."""
    first: dict[str, str] = {}
    for name in names:
        if look(name) in first:
            yield name, first[look(name)]
        first.setdefault(look(name), name)


def _tables(parts: Parts) -> Iterator[str]:
    """Tables with names that the study does not have."""
    for index, table in enumerate(parts.tables):
        known: dict[str, Iterable[str]] = {
            "datasets": parts.datasets,
            "archs": parts.archs,
            "methods": [*parts.methods, *parts.models],
            "attacks": parts.attack_params,
        }
        asked = [(key, name) for key in known for name in getattr(table, key)]
        known["selection"] = parts.evaluation.selections
        for key, name in [*asked, ("selection", table.selection)]:
            if name not in known[key]:
                choices = f"one of the study's: {', '.join(known[key])}"
                yield _line(
                    f"tables.{index}.{key}", name, f"{choices}{nearest_match(name, known[key])}"
                )


def _published(parts: Parts) -> Iterator[str]:
    """Missing files of published numbers."""
    for index, table in enumerate(parts.tables):
        for name in table.published:
            if not os.path.isfile(name):
                yield f"tables.{index}.published = {show(name)}: no such file"


def _warm_ups(study: Study, cells: Iterable[Cell]) -> Iterator[str]:
    """Warm-ups of eps that are longer than the first stage, for networks trained from scratch."""
    keys = {id(block.training): block.training_key for block in study.blocks}
    reported = set()
    for cell in cells:
        planned = study.planned[cell]
        if study.is_external(cell.method) or study.start_method(cell.method):
            continue
        epochs = next((fit.epochs for fit in planned.stages.values()), None)
        warmup, key = planned.crafting.eps_warmup, keys[id(planned.training)]
        if epochs is not None and warmup > epochs and (key, cell.method) not in reported:
            reported.add((key, cell.method))
            expected = f"at most the {epochs} epochs of the first stage of '{cell.method}'"
            yield _line(f"{key}.crafting.eps_warmup", warmup, expected)


def _surrogates(study: Study, cells: Iterable[Cell]) -> Iterator[str]:
    """Black-box transfer attacks without a surrogate network."""
    for cell in cells:
        for selection in study.evaluation.selections:
            try:
                study.surrogates(cell, selection)
            except UsageError as error:
                yield str(error)
                return
