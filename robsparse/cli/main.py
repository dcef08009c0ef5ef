"""The command line: check, plan, train, evaluate, collect, figures, export, new-method, bench.

Exit codes: 0 done, 1 a run failed, 2 bad input (one line says what), 75 stopped by a signal and
ready to be resumed, 130 stopped by Ctrl-C (resumable too). Torch is imported only by the commands
that need it.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

from robsparse import __version__
from robsparse.base.errors import RunError, UsageError, nearest
from robsparse.schema.sections import MOST_THREADS
from robsparse.study import checks, loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.study.targets import Target

EXIT_FAILED, EXIT_USAGE, EXIT_RESUME, EXIT_INTERRUPTED = 1, 2, 75, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UsageError as error:
        for line in str(error).splitlines():
            print(f"robsparse: error: {line}", file=sys.stderr)
        return EXIT_USAGE
    except RunError as error:
        print(f"robsparse: error: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:  # a full disk, say; files are renamed only when they are whole
        print(f"robsparse: error: {error}; nothing half-written is left", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("robsparse: stopped; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="robsparse",
        description="Train, attack and compare sparse robust networks.",
        epilog="`snakemake --cores N` calls these commands for a whole study.",
    )
    parser.add_argument("--version", action="version", version=f"robsparse {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (run, text, detail) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {detail}",
            epilog="Exit codes: 0 done, 1 the run failed, 2 bad input, 75 or 130 stopped by a "
            "signal (the same command continues).",
        )
        command.set_defaults(run=run)
        if name not in ("new-method", "bench"):
            command.add_argument(
                "config",
                metavar="CONFIG",
                nargs="?" if name == "evaluate" else None,
                help="study file, e.g. config/quick.yaml",
            )
        if name in _OPTIONS:
            _OPTIONS[name](command)
        if name not in ("check", "new-method", "bench"):
            command.add_argument(
                "--results",
                type=Path,
                default=Path("results"),
                metavar="DIR",
                help="folder that holds the folder of each study (default: %(default)s)",
            )
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def _threads(text: str) -> int:
    number = _positive(text)
    if number > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{number}: expected at most {MOST_THREADS} threads")
    return number


def _add_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        help="where to compute (default: the study's machine.device)",
    )
    command.add_argument(
        "--threads",
        type=_threads,
        metavar="N",
        help="CPU threads (default: the study's machine.threads)",
    )


def _add_cell(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cell",
        required=True,
        metavar="KEY",
        help="dataset/arch/method/objective/s0.NNNN/seedN, as printed by plan",
    )


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_cell(command)
    _add_machine(command)


def _add_selection(command: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    command.add_argument(
        "--selection",
        default="best_val",
        choices=("best_val", "last"),
        help="which saved weights (default: %(default)s)",
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_cell(command)
    _add_selection(command)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected numbers like 0.5,0.5,0.5") from None


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_machine(command)
    command.add_argument(
        "--fresh",
        action="store_true",
        help="attack from the start: throw away what a killed evaluation has kept",
    )
    cell = command.add_argument_group("a network of a study (with CONFIG)")
    cell.add_argument("--cell", metavar="KEY", help="as printed by plan")
    _add_selection(cell)
    cell.add_argument(
        "--model",
        type=Path,
        metavar="FILE",
        help="weights to attack instead of the cell's own; the record is written beside them",
    )
    single = command.add_argument_group("any network (without CONFIG)")
    single.add_argument(
        "--weights", type=Path, metavar="FILE", help="safetensors, or a torch state dict"
    )
    single.add_argument("--zoo", metavar="NAME", help="a network of RobustBench's zoo instead")
    single.add_argument(
        "--callable",
        metavar="MODULE:FUNCTION",
        help="a function of yours that returns a torch module instead; it takes images in [0,1]",
    )
    single.add_argument("--arch", metavar="NAME", help="architecture of the weights")
    single.add_argument(
        "--arch-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the architecture, e.g. width=24; may be repeated",
    )
    single.add_argument("--dataset", metavar="NAME", help="data set whose test images are attacked")
    single.add_argument("--data-dir", metavar="DIR", help="where the data set is")
    single.add_argument(
        "--norm", choices=("Linf", "L2"), default="Linf", help="(default: %(default)s)"
    )
    single.add_argument(
        "--eps", default="8/255", help="radius, pixels in [0,1] (default: %(default)s)"
    )
    single.add_argument(
        "--attacks",
        default="clean,pgd,autoattack",
        metavar="LIST",
        help="attacks, with commas (default: %(default)s)",
    )
    single.add_argument(
        "--n-examples", type=_positive, default=1000, metavar="N", help="(default: %(default)s)"
    )
    single.add_argument(
        "--batch-size", type=_positive, default=250, metavar="N", help="(default: %(default)s)"
    )
    single.add_argument("--mean", type=_numbers, help="of each channel, e.g. 0.49,0.48,0.45")
    single.add_argument("--std", type=_numbers, help="of each channel")
    single.add_argument(
        "--match",
        choices=("names", "order"),
        help="match the file's tensors by name, or by order (default: names)",
    )


def _add_partial(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--partial",
        action="store_true",
        help="write to DIR/STUDY/partial: what is there while networks are missing or failed",
    )


def _add_new_method(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="NAME", help="name of the file and in configs")
    command.add_argument("--label", metavar="TEXT", help="name in print (default: from NAME)")


_CASES = ("train", "perturb", "evaluate", "rewire", "data", "together")


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("case", choices=_CASES, help="what to measure")
    command.add_argument(
        "--arch",
        action="append",
        metavar="NAME",
        help="architecture; may be repeated (default: small_cnn and resnet18)",
    )
    command.add_argument(
        "--precision",
        action="append",
        choices=("auto", "fp32", "tf32", "bf16"),
        help="of ours; may be repeated (default: fp32 and auto)",
    )
    command.add_argument(
        "--only", default="", metavar="TEXT", help="run the cases with that in their names"
    )
    options = {
        "--batch-size": (32, "images of a step"),
        "--images": (8, "images that AutoAttack sees"),
        "--repeats": (5, "measurements that the median is taken of"),
        "--threads": (1, "CPU threads"),
    }
    for name, (default, text) in options.items():
        command.add_argument(
            name, type=_positive, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")


def _add_cores(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cores",
        type=_positive,
        default=2,
        metavar="N",
        help="cores that jobs may share (default: %(default)s)",
    )


def _study(arguments: argparse.Namespace) -> tuple[Study, Layout]:
    study = loading.load(arguments.config)
    return study, Layout(getattr(arguments, "results", Path("results")) / study.study)


def _cell_of(study: Study, key: str) -> Cell:
    cell, known = Cell.parse(key), study.cells()
    if cell not in known:
        keys = [other.key for other in known]
        raise UsageError(
            f"cell '{key}' is not part of the study '{study.study}'{nearest(key, keys)}"
        )
    return cell


def _check(arguments: argparse.Namespace) -> None:
    study, _ = _study(arguments)
    if missing := checks.missing_data(study):
        raise UsageError("\n".join(f"{arguments.config}: {line}" for line in missing))
    cells = study.cells()
    print(
        f"{arguments.config}: valid, {len(cells)} networks to train, "
        f"{len(cells) * len(study.evaluation.selections)} evaluations"
    )
    for line in study.left_out():
        print(line)


def _plan(arguments: argparse.Namespace) -> None:
    study, layout = _study(arguments)
    planning = importlib.import_module("robsparse.tools.planning")
    print(planning.describe(study, layout, arguments.cores))


def _train(arguments: argparse.Namespace) -> int:
    study, layout = _study(arguments)
    cell = _cell_of(study, arguments.cell)
    training = importlib.import_module("robsparse.training.loop")
    checkpoints = importlib.import_module("robsparse.training.checkpoints")
    try:
        training.train_cell(study, cell, layout, device=arguments.device, threads=arguments.threads)
    except checkpoints.Interrupted as stopped:
        print(f"robsparse: {stopped}", file=sys.stderr)
        return EXIT_INTERRUPTED if stopped.signum == signal.SIGINT else EXIT_RESUME
    return 0


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
    study, layout = _study(arguments)
    cell = _cell_of(study, arguments.cell)
    if arguments.selection not in study.evaluation.selections:
        raise UsageError(
            f"{arguments.config}: evaluation.selections has no '{arguments.selection}'"
        )
    source, target = study.source(cell.method), None
    if arguments.model is not None:
        target = Target.of_file(arguments.model, source.match)
    evaluation = importlib.import_module("robsparse.evaluation.evaluate")
    record = evaluation.evaluate_cell(
        study,
        cell,
        arguments.selection,
        layout,
        target=target,
        fresh=arguments.fresh,
        device=arguments.device,
        threads=arguments.threads,
    )
    print(f"evaluated {cell.key}: {record}")


def _evaluate_single(arguments: argparse.Namespace) -> None:
    wanted: tuple[str, ...] = (
        "weights",
        "zoo",
        "callable",
        "arch",
        "arch_option",
        "match",
        "mean",
        "std",
    )
    wanted += ("dataset", "data_dir", "norm", "eps", "n_examples", "batch_size")
    options = {name: getattr(arguments, name) for name in wanted}
    attacks = [name.strip() for name in arguments.attacks.split(",")]
    study = importlib.import_module("robsparse.study.single").study_of(**options, attacks=attacks)
    [cell] = study.cells()
    source = study.source(cell.method)
    if source.file is None:
        target = Target.as_built(arguments.results, source)
    else:
        target = Target.of_file(source.file, source.match)
    evaluation = importlib.import_module("robsparse.evaluation.evaluate")
    record = evaluation.evaluate_cell(
        study,
        cell,
        "last",
        Layout(arguments.results / study.study),
        target=target,
        fresh=arguments.fresh,
        device=arguments.device,
        threads=arguments.threads,
    )
    print(evaluation.in_words(record))


def _export(arguments: argparse.Namespace) -> None:
    study, layout = _study(arguments)
    cell = _cell_of(study, arguments.cell)
    export = importlib.import_module("robsparse.tools.export")
    path = export.model_info(study, cell, arguments.selection, layout)
    print(f"{path}: fill in link, name, authors and venue")
    print(f"{export.copy_weights(cell, arguments.selection, layout)}: the weights")


def _new_method(arguments: argparse.Namespace) -> None:
    scaffold = importlib.import_module("robsparse.tools.scaffold")
    print(scaffold.new_method(arguments.name, arguments.label))


def _bench(arguments: argparse.Namespace) -> None:
    bench = importlib.import_module("robsparse.tools.bench")
    settings = bench.settings_of(
        arguments.arch or ["small_cnn", "resnet18"],
        arguments.precision or ["fp32", "auto"],
        device=arguments.device,
        threads=arguments.threads,
        batch_size=arguments.batch_size,
        images=arguments.images,
        repeats=arguments.repeats,
        only=arguments.only,
    )
    print(bench.run(arguments.case, settings, arguments.json))


def _collect(arguments: argparse.Namespace) -> None:
    study, layout = _study(arguments)
    collection = importlib.import_module("robsparse.collection.collect")
    print(collection.collect(study, layout, layout.tables(arguments.partial)))


def _figures(arguments: argparse.Namespace) -> None:
    study, layout = _study(arguments)
    report = importlib.import_module("robsparse.figures.report")
    print(report.write(study, layout, layout.tables(arguments.partial)))


_OPTIONS = {
    "collect": _add_partial,
    "figures": _add_partial,
    "plan": _add_cores,
    "train": _add_train,
    "evaluate": _add_evaluate,
    "export": _add_export,
    "new-method": _add_new_method,
    "bench": _add_bench,
}
_COMMANDS = {
    "check": (
        _check,
        "validate a config",
        "Each fault is one line that names file, key, value, "
        "what was expected and the nearest match.",
    ),
    "plan": (
        _plan,
        "list the jobs of a study and estimate their time",
        "Passes of the study's "
        "networks are timed on this machine for a few seconds; finished jobs count as done.",
    ),
    "train": (
        _train,
        "train one cell",
        "Writes best_val.safetensors, last.safetensors, "
        "training.json and steps.parquet to DIR/STUDY/models/KEY. An interrupted run "
        "continues from DIR/STUDY/resume/KEY, bit for bit.",
    ),
    "evaluate": (
        _evaluate,
        "attack one network and write a record",
        "With CONFIG: runs the attacks that the study lists for the selection and writes "
        "DIR/STUDY/evaluations/KEY/SELECTION.json and the outcome of each image beside it. "
        "Without: attacks the network of a file and writes the record beside the file.",
    ),
    "collect": (
        _collect,
        "gather all records into one table",
        "Checks them and writes results.csv, "
        "results.parquet, layers.csv, curves.csv and steps.parquet to DIR/STUDY; what is "
        "missing is listed.",
    ),
    "figures": (
        _figures,
        "draw tables and plots from the collected results",
        "Writes report.md, tables/ and plots/ to DIR/STUDY.",
    ),
    "export": (
        _export,
        "write a result as an entry for RobustBench",
        "Writes SELECTION.model_info.json and SELECTION.safetensors (the weights) to "
        "DIR/STUDY/export/KEY.",
    ),
    "new-method": (
        _new_method,
        "start a method of your own from the template",
        "Writes baselines/NAME.py, a whole method with empty hooks.",
    ),
    "bench": (
        _bench,
        "measure this suite against textbook code and the machine",
        "Both run in turn in one process, after a warm-up; medians are compared, and ours with "
        "what the machine's arithmetic allows.",
    ),
}
