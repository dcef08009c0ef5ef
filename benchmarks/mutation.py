"""Mutation testing: changes one expression of the code at a time and asks whether a test notices.

    python benchmarks/mutation.py                          all modules, 25 mutants of each
    python benchmarks/mutation.py sparsity.scores --sample 0  every mutant of one module (or more)
    python benchmarks/mutation.py --table                  prints the table of what has been run

The mutants are those of mutmut (its operators, on the syntax tree). Its own runner skips decorated
functions and needs the package as one tree; this file runs the mutants instead. The parent process
imports torch and the tests once and forks a child for each mutant. The child gives the function its
changed code and runs the tests that cover the changed lines, the fastest first, to the first
failure.

Not mutated: module level and class level, decorators, defaults of arguments, type hints and
docstrings; `raise` and `assert` statements and calls of `print` and `warnings.warn`; strings that
contain a space (sentences) and upper or lower case of other strings.

A finished mutant is a line of a JSON file (--results). The same command goes on where it stopped. A
mutant that was killed is not run again as long as its function is the same; --retry runs the
survivors again. A mutant counts as a timeout when it needs five times the processor time of its
tests and 10 s more. No result depends on how busy the machine is.
"""

import argparse
import contextlib
import gc
import hashlib
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType

os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}

import coverage
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).resolve().parent.parent
ATTACKS = ("unit/test_attack_settings.py", "unit/test_agreement.py", "contract/test_attacks.py")
EVALUATION = ("unit/test_evaluation.py", "unit/test_cache.py", "unit/test_sources.py")
FIGURES = ("unit/test_statistics.py", "unit/test_figures.py")
STUDY = (
    "unit/test_config.py",
    "unit/test_threat.py",
    "unit/test_cells.py",
    "unit/test_sources.py",
    "unit/test_broken_studies.py",
)
TRAINING = (
    "unit/test_training.py",
    "unit/test_threat.py",
    "unit/test_averaging.py",
    "unit/test_weight_perturbation.py",
    "contract/test_methods.py",
)
# Module (below robsparse) -> test files (below tests/) that are about it, besides
# unit/test_<module>.py. A file that does not exist is left out.
MODULES: dict[str, tuple[str, ...]] = {
    "base.counts": (),
    "base.files": (),
    "sparsity.layers": ("unit/test_sparsity.py",),
    "sparsity.budgets": ("unit/test_sparsity.py", "unit/test_bcs.py"),
    "sparsity.masks": ("unit/test_sparsity.py",),
    "sparsity.scores": ("unit/test_dynamic.py", "unit/test_hydra.py"),
    "sparsity.rewiring": (),
    "sparsity.history": (),
    "method.bcs": ("unit/test_bcs_training.py", "unit/test_parity.py"),
    "training.dynamic": (),
    "training.objectives": ("unit/test_threat.py",),
    "training.loop": TRAINING,
    "training.session": TRAINING,
    "training.recorder": TRAINING,
    "training.resuming": TRAINING,
    "training.stages": ("unit/test_training.py",),
    "training.batches": ("unit/test_augment.py", "unit/test_training.py"),
    "training.augment": (),
    "training.validation": ("unit/test_training.py",),
    "training.checkpoints": (),
    "compute.perturb": ("unit/test_objectives.py", "unit/test_attack_settings.py"),
    "compute.randomness": ("unit/test_training.py",),
    "study.fingerprints": ("unit/test_cache.py",),
    "study.source_code": ("unit/test_fingerprints.py",),
    "study.checks": (),
    "study.cells": (),
    "study.parts": STUDY,
    "study.planned": STUDY,
    "study.resolving": STUDY,
    "study.study": STUDY,
    "schema.external": ("unit/test_sources.py", "unit/test_evaluation.py"),
    "study.targets": ("unit/test_evaluation.py", "unit/test_sources.py"),
    "fast.folding": ("unit/test_folding_fallback.py",),
    "fast.folded_layers": ("unit/test_folding.py", "unit/test_folding_fallback.py"),
    "fast.tracing": ("unit/test_folding.py", "unit/test_folding_fallback.py"),
    "fast.proof": ("unit/test_folding_fallback.py",),
    "fast.structure": ("unit/test_folding_fallback.py",),
    "evaluation.attacks": ATTACKS,
    "evaluation.cache": ("unit/test_attacks.py",),
    "evaluation.job": EVALUATION,
    "evaluation.measure": EVALUATION,
    "evaluation.record": EVALUATION,
    "evaluation.runner": EVALUATION,
    "evaluation.sanity_checks": (),
    "evaluation.tally": ATTACKS,
    "evaluation.random_search": ("unit/test_sanity_checks.py", "unit/test_minimum_norm.py"),
    "evaluation.fast_minimum_norm": ("unit/test_minimum_norm.py", "unit/test_agreement.py"),
    "eval.autoattack": ATTACKS,
    "eval.clean": ATTACKS,
    "eval.fgsm": ATTACKS,
    "eval.fmn": (*ATTACKS, "unit/test_minimum_norm.py"),
    "eval.minimum_norm": ATTACKS,
    "eval.pgd": ATTACKS,
    "eval.square": ATTACKS,
    "eval.transfer": ATTACKS,
    "records.rows": (),
    "records.evaluation_record": (),
    "collection.collect": ("unit/test_collection.py",),
    "collection.gather": ("unit/test_collection.py",),
    "collection.plausibility": ("unit/test_collection.py",),
    "collection.overlap": (),
    "figures.data.statistics": FIGURES,
    "figures.data.summary": FIGURES,
    "figures.data.compare": FIGURES,
    "figures.data.tidy": FIGURES,
}
SENTENCES = {"print", "warn"}


@dataclass(frozen=True)
class Mutant:
    """One changed expression of a function; `function` is its name inside the module."""

    module: str
    function: str
    line: int
    lines: frozenset[int]  # of the whole statement: its tests are the mutant's
    before: str
    after: str
    key: str  # the same as long as the function is
    make: Callable[[], str]  # the text of the changed module


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed, survived, timeout, or none (the code is the same)."""

    key: str
    module: str
    function: str
    line: int
    before: str
    after: str
    outcome: str
    tests: int  # how many test functions cover it


# ---------------------------------------------------------------- mutants


class Visitor(MutationVisitor):
    """The mutants of mutmut, in decorated functions too, less those that the rules leave out."""

    METADATA_DEPENDENCIES = (*MutationVisitor.METADATA_DEPENDENCIES, ParentNodeProvider)

    def __init__(self) -> None:
        super().__init__(mutation_operators, IgnoredCode(set(), set(), set()))

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef):
            return False
        if isinstance(node, cst.Raise | cst.Assert | cst.Param):
            return True
        if isinstance(node, cst.Call):
            called = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
            if isinstance(called, cst.Name) and called.value in SENTENCES:
                return True
        return super()._skip_node_and_children(node)

    def _create_mutations(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.BaseString):
            self._operators = [(cst.SimpleString, _longer)]
        super()._create_mutations(node)
        self._operators = mutation_operators


def _longer(node: cst.SimpleString) -> Iterator[cst.SimpleString]:
    if " " not in node.value and not node.value.endswith(('"""', "'''")):
        yield node.with_changes(value=f"{node.value[:-1]}XX{node.value[-1]}")


def mutants_of(module: str, path: Path) -> list[Mutant]:
    """All mutants of a file, in the order of its text."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()))
    visitor = Visitor()
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    parents = wrapper.resolve(ParentNodeProvider)
    numbers: Counter[str] = Counter()
    found = []
    for mutation in visitor.mutations:
        node = mutation.original_node
        around = [node]
        while around[-1] in parents:
            around.append(parents[around[-1]])
        outer = _outermost_function(around)
        if outer is None:
            continue
        name, function = outer
        statement = next(
            n for n in around if isinstance(n, cst.BaseSmallStatement | cst.BaseStatement)
        )
        simple = isinstance(statement, cst.BaseSmallStatement)
        span = positions[statement if simple else node]
        before, after = (wrapper.module.code_for_node(n) for n in (node, mutation.mutated_node))
        numbers[name] += 1
        text = wrapper.module.code_for_node(function)
        words = (module, name, str(numbers[name]), before, after, text)
        found.append(
            Mutant(
                module,
                name,
                positions[node].start.line,
                frozenset(range(span.start.line, span.end.line + 1)),
                before,
                after,
                hashlib.sha256("\n".join(words).encode()).hexdigest()[:16],
                partial(_changed, wrapper.module, node, mutation.mutated_node),
            )
        )
    return found


def _changed(module: cst.Module, before: cst.CSTNode, after: cst.CSTNode) -> str:
    return deep_replace(module, before, after).code


def _outermost_function(around: list[cst.CSTNode]) -> tuple[str, cst.FunctionDef] | None:
    """(name, function) of the outermost function of a chain of nodes; name is `Class.method`."""
    names = []
    for node in reversed(around):
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            names.append(node.name.value)
        if isinstance(node, cst.FunctionDef):
            return ".".join(names), node
    return None


def sample_of(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """`number` mutants by chance (0: all), the same ones as long as their functions are."""
    by_chance = sorted(mutants, key=lambda m: hashlib.sha256(f"{seed} {m.key}".encode()).digest())
    return by_chance[: number or None]


# ---------------------------------------------------------------- the code of a function


def functions_in(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """Code of the functions and methods of a module, by name and order among its namesakes."""
    found: dict[tuple[str, int], CodeType] = {}
    numbers: Counter[str] = Counter()
    waiting = [code]
    while waiting:
        for inner in waiting.pop(0).co_consts:
            if not isinstance(inner, CodeType) or inner.co_name.startswith("<"):
                continue
            if inner.co_flags & inspect.CO_NEWLOCALS:  # a function; else the body of a class
                found[inner.co_qualname, numbers[inner.co_qualname]] = inner
                numbers[inner.co_qualname] += 1
            else:
                waiting.append(inner)
    return found


def living_functions(path: Path) -> list[FunctionType]:
    """Every function of this process that a file has defined, also decorated and nested ones."""
    functions = (f for f in gc.get_objects() if type(f) is FunctionType)
    return [f for f in functions if os.path.realpath(f.__code__.co_filename) == str(path)]


def put_in(path: Path, mutant: Mutant, living: list[FunctionType]) -> bool:
    """Give every living function of the mutant's name its changed code; False where none has it."""
    before = functions_in(compile(path.read_text(), str(path), "exec"))
    after = functions_in(compile(mutant.make(), str(path), "exec"))
    changed = {
        (old.co_qualname, old.co_firstlineno): after[name]
        for name, old in before.items()
        if name[0] == mutant.function and old != after[name]
    }
    done = False
    for function in living:
        code = function.__code__
        new = changed.get((code.co_qualname, code.co_firstlineno))
        if new is None:
            continue
        if code.co_freevars != new.co_freevars:
            return False
        function.__code__ = new
        done = True
    return done


# ---------------------------------------------------------------- tests


class Watch:
    """Notes for each test function which lines it runs, how long it takes and whether it passes."""

    SHARED = "shared"  # lines that a fixture of several tests runs

    def __init__(self, files: list[Path]) -> None:
        self.coverage = coverage.Coverage(
            data_file=None, config_file=False, include=[str(path) for path in files]
        )
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.context = ""

    def switch(self, context: str) -> None:
        self.context = context
        self.coverage.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        name = item.nodeid.split("[", 1)[0]
        self.switch(name)
        began = time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[name] += time.process_time() - began

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = self.context
        if fixturedef.scope != "function":
            self.switch(self.SHARED)
        try:
            return (yield)
        finally:
            self.switch(before)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid.split("[", 1)[0])

    def found(self) -> dict[str, dict]:
        """{test function: seconds and {file: lines}}, of the tests that pass."""
        data = self.coverage.get_data()
        found = {
            name: {"seconds": seconds, "lines": {}}
            for name, seconds in self.seconds.items()
            if name not in self.failed
        }
        for file in data.measured_files():
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = found if self.SHARED in contexts else set(contexts) & set(found)
                for test in tests:
                    found[test]["lines"].setdefault(file, []).append(line)
        return found


def keep_tracing() -> None:
    """Let nobody end the measurement: AutoAttack's check of a network calls sys.settrace(None)."""
    measuring, settrace = sys.gettrace(), sys.settrace
    sys.settrace = lambda function: settrace(function or measuring)


def run_pytest(words: list[str], plugins: tuple = ()) -> int:
    """Run pytest in this process, without a word."""
    quiet = ["-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
        return int(pytest.main([*quiet, *words], plugins=list(plugins)))


def covering(tests: list[str], folder: Path) -> dict[str, dict]:
    """What the tests cover of all modules; kept in `folder` until a source or a test changes."""
    files = [path_of(name) for name in MODULES]
    sources = sorted(
        path
        for room in ("robsparse", "method", "baselines", "eval", "figures", "tests")
        for path in (ROOT / room).rglob("*.py")
    )
    text = hashlib.sha256(repr([str(path) for path in files]).encode())
    for path in sources:
        if "test_" not in path.name:
            text.update(path.read_bytes())
    found: dict[str, dict] = {}
    for test in tests:
        one = text.copy()
        one.update((ROOT / "tests" / test).read_bytes())
        kept = folder / f"{test.replace('/', '-')}-{one.hexdigest()[:12]}.json"
        if not kept.exists():
            pid = os.fork()
            if pid == 0:
                _watch(files, test, kept)
            os.waitpid(pid, 0)
        found |= json.loads(kept.read_text())
    return found


def _watch(files: list[Path], test: str, kept: Path) -> None:
    """Run a test file and write what it covers; ends the process."""
    try:
        watch = Watch(files)
        with tempfile.TemporaryDirectory() as scratch:
            watch.coverage.start()
            keep_tracing()
            run_pytest([f"--basetemp={scratch}/t", str(ROOT / "tests" / test)], (watch,))
            watch.coverage.stop()
        partly = kept.with_suffix(".partly")
        partly.write_text(json.dumps(watch.found()))
        partly.rename(kept)
    finally:
        os._exit(0)


# ---------------------------------------------------------------- running


HANG = 1800.0  # seconds of the clock: only a mutant that waits for ever needs as long


def judged(
    mutant: Mutant, path: Path, tests: dict[str, dict], living: list[FunctionType]
) -> Verdict:
    """Run the tests that cover a mutant in a child process."""
    chosen = [
        name
        for name, test in sorted(tests.items(), key=lambda item: item[1]["seconds"])
        if mutant.lines & set(test["lines"].get(str(path), ()))
    ]
    seconds = sum(tests[name]["seconds"] for name in chosen)
    outcome = "survived"
    if chosen:
        pid = os.fork()
        if pid == 0:
            _try(lambda: put_in(path, mutant, living), chosen, 10 + 5 * seconds)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)  # what its tests have left running
        if os.WIFSIGNALED(status):
            late = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGALRM, signal.SIGKILL)
            outcome = "timeout" if late else "killed"
        else:
            outcome = {0: "survived", SAME: "none"}.get(os.WEXITSTATUS(status), "killed")
    words = (mutant.key, mutant.module, mutant.function, mutant.line, mutant.before, mutant.after)
    return Verdict(*words, outcome, len(chosen))


SAME = 77


def _try(change: Callable[[], bool], tests: list[str], seconds: float) -> None:
    """Change the code and run tests; ends the process with pytest's exit status."""
    status = 1
    try:
        os.setpgid(0, 0)
        signal.setitimer(signal.ITIMER_REAL, HANG)
        limit = int(seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if not change():
            os._exit(SAME)
        with tempfile.TemporaryDirectory() as scratch:
            status = run_pytest(["-x", f"--basetemp={scratch}/t", *tests])
    finally:
        os._exit(status)


def verdicts_in(path: Path) -> dict[str, Verdict]:
    """The last verdict on each mutant of a file of results."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Verdict(**json.loads(line)) for line in lines]
    return {verdict.key: verdict for verdict in found}


def run(samples: dict[str, list[Mutant]], results: Path, retry: bool) -> None:
    """Judge the mutants that have no verdict yet and add theirs to the file."""
    known = verdicts_in(results)
    again = {"survived"} if retry else set()
    files = {name: path_of(name) for name in samples}
    waiting = {
        name: [m for m in mutants if m.key not in known or known[m.key].outcome in again]
        for name, mutants in samples.items()
    }
    tests = {name: tests_of(name) for name, mutants in waiting.items() if mutants}
    everything = sorted({test for some in tests.values() for test in some})
    said = os.dup(1), os.dup(2)
    run_pytest(["--collect-only", *(str(ROOT / "tests" / test) for test in everything)])
    os.dup2(said[0], 1), os.dup2(said[1], 2)
    for name, some in tests.items():
        covered = covering(some, results.parent)
        living = living_functions(files[name])
        for mutant in waiting[name]:
            verdict = judged(mutant, files[name], covered, living)
            with results.open("a") as file:
                file.write(f"{json.dumps(asdict(verdict))}\n")
            print(f"{name}.{verdict.function}:{verdict.line} {verdict.outcome}", flush=True)


def tests_of(module: str) -> list[str]:
    """Test files of a module, below tests/."""
    own = f"unit/test_{module.rpartition('.')[2]}.py"
    named = dict.fromkeys((own, *MODULES[module]))
    return [test for test in named if (ROOT / "tests" / test).exists()]


def path_of(module: str) -> Path:
    """File of a module; method, baselines, eval and figures lie beside the package."""
    name = f"{module.replace('.', '/')}.py"
    inside = ROOT / "robsparse" / name
    return inside if inside.exists() else ROOT / name


# ---------------------------------------------------------------- the table


def table(samples: dict[str, list[Mutant]], known: dict[str, Verdict]) -> str:
    """Markdown: one row a module, then the survivors."""
    lines = [
        "| module | mutants | killed | timeout | survived | score |",
        "|---|---|---|---|---|---|",
    ]
    total: Counter[str] = Counter()
    left = []
    for name, mutants in samples.items():
        verdicts = [known[m.key] for m in mutants if m.key in known]
        counts = Counter(verdict.outcome for verdict in verdicts if verdict.outcome != "none")
        if counts:
            lines.append(_row(name, counts))
        total += counts
        left += [verdict for verdict in verdicts if verdict.outcome == "survived"]
    lines += [_row("all", total), "", "Survivors:", ""]
    for verdict in left:
        before, after = (" ".join(text.split()) for text in (verdict.before, verdict.after))
        place = f"{verdict.module}.{verdict.function}:{verdict.line}"
        lines.append(f"- {place} ({verdict.tests} tests): `{before}` -> `{after}`")
    return "\n".join(lines)


def _row(name: str, counts: Counter[str]) -> str:
    number = counts.total()
    score = (number - counts["survived"]) / max(1, number)
    cells = (name, number, counts["killed"], counts["timeout"], counts["survived"], f"{score:.0%}")
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    arguments = _parser().parse_args()
    names = arguments.modules or [*MODULES]
    samples = {
        name: sample_of(mutants_of(name, path_of(name)), arguments.sample, arguments.seed)
        for name in names
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        run(samples, arguments.results, arguments.retry)
    print(table(samples, verdicts_in(arguments.results)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*MODULES, []], metavar="module")
    parser.add_argument("--sample", type=int, default=25, help="mutants a module; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--results", type=Path, default=ROOT / "results/mutation/mutants.jsonl")
    parser.add_argument("--retry", action="store_true", help="run the survivors again")
    parser.add_argument("--table", action="store_true", help="print the table, run nothing")
    return parser


if __name__ == "__main__":
    main()
