"""Runs a study: calls snakemake with one progress display, and says at the end what to look at."""

import contextlib
import importlib
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markdown import Markdown

from robsparse.base.errors import UsageError, nearest_match
from robsparse.base.files import read_table, read_text, write_text
from robsparse.figures import REPORT
from robsparse.records.rows import KEY
from robsparse.schema.fields import rounded_sparsity
from robsparse.study import checks, loading
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study
from robsparse.tools.progress import TRAIN, Display, Job, Lines, Progress, logger_plugin, reason_of

ROOT = Path("results")
_PLUGIN = "snakemake_logger_plugin_robsparse"
INTERRUPTED = 130


def run(
    config: Path,
    *,
    cores: str,
    changes: Sequence[str] = (),
    only: Sequence[str] = (),
    executor: str | None = None,
    further: Sequence[str] = (),
) -> int:
    """Run the workflow of a study.

    Args:
        config: the study file.
        cores: number of cores that jobs may share, or "all"; with an executor, number of jobs.
        changes: changed settings, like "evaluation.n_examples=50". The changed study is written to
            results/STUDY/config.yaml.
        only: networks that are attacked, like "method=bcs,lwm"; all of them if it is empty.
        executor: executor plugin of snakemake; None: this machine.
        further: further options of snakemake.

    Returns:
        The exit code: 0, 1 if a job failed, 130 if the run was stopped.

    Raises:
        UsageError: if the study, a change or a choice is wrong. Nothing is started then.
    """
    if not Path("Snakefile").exists():
        raise UsageError("Snakefile: no such file; expected to run in the folder of the repository")
    study, config = _study(config, changes)
    if missing := checks.missing_data(study):
        raise UsageError("\n".join(f"{config}: {line}" for line in missing))
    layout = Layout(ROOT / study.study)
    cells = chosen(study, only)
    targets = [str(layout.evaluation(c, s)) for c in cells for s in study.evaluation.selections]
    progress = Progress(len(with_inputs(study, cells)), len(targets))
    words = [*(targets if only else []), *further, "--configfile", str(config)]
    words += ["--executor", executor, "--jobs", cores] if executor else ["--cores", cores]
    code, printed = _snakemake(words, progress)
    progress.interrupted |= bool(progress.stopped)
    if code and not progress.failed and not progress.interrupted:
        print(*progress.messages, sep="\n", file=sys.stderr)
    else:
        print(_result(study, layout, progress, bool(only), printed))
    return INTERRUPTED if progress.interrupted else code


def _study(config: Path, changes: Sequence[str]) -> tuple[Study, Path]:
    """The study and its file: with changes, the file of the changed study."""
    if not changes:
        return loading.load(config), config
    data = loading.read(config)
    for change in changes:
        _set(data, change)
    study = loading.validate(data, f"{config} with --set {' '.join(changes)}")
    path = ROOT / study.study / "config.yaml"
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    write_text(path, f"# {config} with {' '.join(changes)}\n{text}")
    print(f"{path}: the changed study", file=sys.stderr)
    return study, path


def _set(data: Any, change: str) -> None:
    """Set a value in the content of a study file, like "grid.seeds=[0]"."""
    key, equals, text = change.partition("=")
    *parents, last = key.split(".")
    expected = "expected KEY=VALUE, like evaluation.n_examples=50"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UsageError(f"--set {change}: the value is not valid YAML; {expected}") from None
    if not equals or not all([*parents, last]):
        raise UsageError(f"--set {change}: {expected}")
    place = data
    for part in parents:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _entry(place, part, key)
    if isinstance(place, dict):
        place[last] = value
    else:
        _entry(place, last, key)
        place[int(last)] = value


def _entry(place: Any, part: str, key: str) -> Any:
    """The entry of a list with the number `part`."""
    if not isinstance(place, list) or not part.isdigit() or int(part) >= len(place):
        raise UsageError(f"--set {key}: '{part}' is no key and no entry of a list there")
    return place[int(part)]


def chosen(study: Study, only: Sequence[str]) -> list[Cell]:
    """The networks of a study that every choice includes. A choice is AXIS=VALUE,VALUE,...

    Raises:
        UsageError: if an axis or a value does not exist, or if no network is left.
    """
    cells, axes = study.cells(), [field.name for field in fields(Cell)]
    for choice in only:
        axis, equals, text = choice.partition("=")
        if axis not in axes or not equals:
            raise UsageError(
                f"--only {choice}: expected AXIS=VALUE with an axis of {', '.join(axes)}"
                f"{nearest_match(axis, axes)}"
            )
        known = {str(getattr(cell, axis)) for cell in study.cells()}
        values = [_as_axis(axis, value) for value in text.split(",")]
        for value in values:
            if value not in known:
                raise UsageError(
                    f"--only {choice}: the study has no {axis} '{value}', expected one of: "
                    f"{', '.join(sorted(known))}{nearest_match(value, known)}"
                )
        cells = [cell for cell in cells if str(getattr(cell, axis)) in values]
    if not cells:
        raise UsageError(f"--only {' '.join(only)}: no network of the study has all of these")
    return cells


def _as_axis(axis: str, value: str) -> str:
    """A value in the form of a cell: 0.90 and .9 are the sparsity 0.9."""
    try:
        return str(rounded_sparsity(float(value))) if axis == "sparsity" else value.strip()
    except ValueError:
        return value


def with_inputs(study: Study, cells: Sequence[Cell]) -> set[Cell]:
    """The cells, and all networks that they start from or that attacks on them need."""
    found = set(cells)
    for cell in cells:
        for selection in study.evaluation.selections:
            found |= set(study.surrogates(cell, selection))
    return found | {start for cell in found if (start := study.starting_cell(cell))}


def _snakemake(words: Sequence[str], progress: Progress) -> tuple[int, str]:
    """Run snakemake in this process; return its exit code and what the workflow printed."""
    command = importlib.import_module("snakemake.cli")
    registry = importlib.import_module("snakemake_interface_logger_plugins.registry")
    view = Display(progress) if sys.stderr.isatty() else Lines(progress)
    registry.LoggerPluginRegistry().register_plugin(_PLUGIN, logger_plugin(progress, view))
    printed = io.StringIO()
    with _shown(view), contextlib.redirect_stdout(printed):
        try:
            command.main([*words, "--logger", "robsparse"])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            progress.interrupted, code = True, INTERRUPTED
    return code, printed.getvalue()


@contextlib.contextmanager
def _shown(view: Lines | Display) -> Iterator[None]:
    view.start()
    try:
        yield
    finally:
        view.stop()


def _result(study: Study, layout: Layout, progress: Progress, part: bool, printed: str) -> str:
    """What to print at the end of a run."""
    again, failed = "the same command continues", []
    if progress.failed:
        number = len(progress.failed)
        failed = [f"{number} {'job' if number == 1 else 'jobs'} failed:"]
        failed += [_failure(layout, job) for job in progress.failed.values()]
    if progress.interrupted:
        return "\n".join([*failed, f"stopped: {progress}; {again}"])
    if failed:
        last = f"{again}: it runs only what failed or is missing"
        return "\n".join([*failed, *_look_at(layout.tables(partial=True)), last])
    if part:
        _draw_part(study, layout)
        return "\n".join([str(progress), *_look_at(layout.tables(partial=True))])
    table = _fitted(printed.rstrip()) or "nothing to do: everything is up to date"
    return "\n".join([table, *_look_at(layout.root)])


def _fitted(markdown: str) -> str:
    """Markdown drawn for the width of the terminal; as it is if the output is a file."""
    if not sys.stdout.isatty():
        return markdown
    console = Console()
    with console.capture() as drawn:
        console.print(Markdown(markdown))
    return drawn.get().rstrip()


def _failure(layout: Layout, job: Job) -> str:
    """A failed job with its own error message, and its log."""
    path = layout.failed(Cell.parse(job.cell)) if job.rule == TRAIN and job.cell else None
    if path is not None and path.exists():
        reason = " ".join(read_text(path).split())
    else:
        reason = reason_of(job.log)
    return f"  {job.what}: {reason}\n    log: {job.log}"


def _draw_part(study: Study, layout: Layout) -> None:
    """Draw the networks of a part of the study, as after a failure."""
    folder = layout.tables(partial=True)
    importlib.import_module("robsparse.collection.collect").collect(study, layout, folder)
    importlib.import_module("robsparse.figures.report").write(study, layout, folder)


def _look_at(folder: Path) -> Iterator[str]:
    """The report, and the number of networks that are potentially unreliable."""
    reports = [folder / name for name in ("report.html", REPORT) if (folder / name).exists()]
    if not reports:
        return
    yield f"look at: {reports[0]}"
    table, column = folder / "results.csv", "potentially_unreliable"
    rows = read_table(table, dtype=str, keep_default_na=False)
    if not {*KEY[:7], column} <= {*rows.columns}:
        raise UsageError(f"{table}: damaged, it lacks columns; run `robsparse collect CONFIG`")
    networks = rows.drop_duplicates(KEY[:7], keep="last")
    marked = int((networks[column] != "").sum())
    if marked:
        yield (
            f"{marked} of {len(networks)} networks are potentially unreliable: see the reasons in "
            f"the column {column} of {table}"
        )
