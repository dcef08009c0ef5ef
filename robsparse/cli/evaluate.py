"""The command that attacks one network: a network of a study or an external model."""

import argparse
import importlib
from pathlib import Path
from typing import Any

from robsparse.base.errors import UsageError
from robsparse.cli.arguments import (
    Command,
    add_machine,
    add_selection,
    load_cell,
    positive,
    reserved_gpu,
)
from robsparse.schema.evaluation import Selection
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.study.targets import Target

# Options that `one_network.study_of` takes as they are.
_OF_STUDY = (
    *("arch_option", "dataset", "dataset_option", "split_of"),
    *("norm", "eps", "attack_option"),
)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers like 0.5,0.5,0.5") from None


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    add_machine(command)
    command.add_argument(
        "--fresh",
        action="store_true",
        help="attack from the start: delete the cache of an interrupted evaluation first",
    )
    cell = command.add_argument_group("a network of a study (with CONFIG)")
    cell.add_argument("--cell", metavar="KEY", help="key of the cell; `plan` prints it")
    add_selection(cell)
    cell.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="attack the weights of this file, not those of the cell; the record is written beside "
        "it",
    )
    single = command.add_argument_group("any network (without CONFIG)")
    single.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors, or a torch state dict"
    )
    single.add_argument("--zoo", metavar="NAME", help="or: a network of RobustBench's zoo")
    single.add_argument(
        "--callable",
        metavar="MODULE:FUNCTION",
        help="or: a function that returns a torch module; its inputs are images in [0,1]",
    )
    single.add_argument("--arch", metavar="NAME", help="architecture of the weights")
    single.add_argument(
        "--arch-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the architecture, e.g. width=24; may be repeated",
    )
    single.add_argument("--mean", type=_numbers, help="mean of each channel, e.g. 0.49,0.48,0.45")
    single.add_argument("--std", type=_numbers, help="standard deviation of each channel")
    single.add_argument(
        "--match",
        choices=("names", "order"),
        help="match the file's tensors by name, or by order (default: names)",
    )
    _add_data(command.add_argument_group("its test images (without CONFIG)"))
    _add_attacks(command.add_argument_group("its attacks (without CONFIG)"))


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--dataset", metavar="NAME", help="data set whose test images are attacked")
    group.add_argument("--data-dir", metavar="DIR", help="folder of the data set")
    group.add_argument(
        "--file", metavar="F", help="file of the data set npz; test images are enough"
    )
    group.add_argument(
        "--dataset-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the data set, e.g. split_seed=1; may be repeated",
    )
    group.add_argument(
        "--split-of",
        type=Path,
        metavar="CONFIG",
        help="use the data set as this study has it, with its split and its folder",
    )
    group.add_argument(
        "--n-examples",
        type=positive,
        metavar="N",
        help="first test images (default: 1000, or all if there are fewer)",
    )


def _add_attacks(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--norm", choices=("Linf", "L2"), default="Linf", help="(default: %(default)s)"
    )
    group.add_argument(
        "--eps",
        help="radius for pixels in [0,1] (default: 8/255, for digits 0.15; for L2 128/255)",
    )
    group.add_argument(
        "--attacks",
        default="clean,pgd,autoattack",
        metavar="LIST",
        help="attacks, separated by commas (default: %(default)s)",
    )
    group.add_argument(
        "--attack-option",
        action="append",
        default=[],
        metavar="ATTACK.KEY=VALUE",
        help="a parameter of an attack, e.g. pgd.steps=20; may be repeated",
    )
    group.add_argument(
        "--batch-size", type=positive, default=250, metavar="N", help="(default: %(default)s)"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the attacks (default: 0)"
    )
    group.add_argument(
        "--no-sanity-checks",
        action="store_true",
        help="leave out the checks for gradient masking",
    )


def _evaluate(arguments: argparse.Namespace) -> None:
    single = arguments.weights or arguments.zoo or arguments.callable
    of_study = arguments.config is not None and arguments.cell is not None
    if of_study == bool(single and arguments.dataset):
        raise UsageError(
            "expected CONFIG --cell KEY, or --weights FILE --arch NAME --dataset NAME "
            "(--zoo NAME or --callable MODULE:FUNCTION instead of weights and arch)"
        )
    if single:
        return _evaluate_single(arguments)
    study, layout, cell = load_cell(arguments)
    if arguments.selection not in study.evaluation.selections:
        raise UsageError(
            f"{arguments.config}: evaluation.selections has no '{arguments.selection}'"
        )
    source, target = study.source(cell.method), None
    if arguments.model is not None:
        target = Target.beside_file(arguments.model, source.match, study.threat)
    record = _attack(arguments, study, cell, arguments.selection, layout=layout, target=target)
    print(f"evaluated {cell.key}: {record}")


def _attack(
    arguments: argparse.Namespace,
    study: Study,
    cell: Cell,
    selection: Selection,
    *,
    layout: Layout,
    target: Target | None,
) -> Path:
    evaluation = importlib.import_module("robsparse.evaluation.evaluate")
    with reserved_gpu(arguments, study):
        path: Path = evaluation.evaluate_cell(
            study,
            cell,
            selection,
            layout,
            target=target,
            fresh=arguments.fresh,
            device=arguments.device,
            threads=arguments.threads,
        )
    return path


def _evaluate_single(arguments: argparse.Namespace) -> None:
    study = importlib.import_module("robsparse.tools.one_network").study_of(
        **{name: getattr(arguments, name) for name in _OF_STUDY},
        model=_model(arguments),
        place=_given(arguments, "file", "data_dir"),
        attacks=[name.strip() for name in arguments.attacks.split(",")],
        evaluation={
            "n_examples": arguments.n_examples,
            "batch_size": arguments.batch_size,
            "seed": arguments.seed,
            **({"sanity_checks": {"n_examples": 0}} if arguments.no_sanity_checks else {}),
        },
    )
    [cell] = study.cells()
    source = study.source(cell.method)
    if source.file is None:
        target = Target.as_built(arguments.results, source, study.threat)
    else:
        target = Target.beside_file(source.file, source.match, study.threat)
    layout = Layout(arguments.results / study.study)
    path = _attack(arguments, study, cell, "last", layout=layout, target=target)
    print(importlib.import_module("robsparse.evaluation.record").summary(path))


def _model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that describe the network, as settings of an external model."""
    model = _given(arguments, "zoo", "callable", "arch", "match", "mean", "std")
    return model | ({"file": str(arguments.weights)} if arguments.weights else {})


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options that were given."""
    found = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


COMMANDS = (
    Command(
        "evaluate",
        _evaluate,
        "attack one network and write a record",
        "With CONFIG: runs the attacks that the study lists for the selection and writes "
        "DIR/STUDY/evaluations/KEY/SELECTION.json, and the outcome of each image beside it. "
        "Without CONFIG: attacks an external model and writes the record beside its file.",
        config="optional",
        add_arguments=_add_evaluate,
    ),
)
