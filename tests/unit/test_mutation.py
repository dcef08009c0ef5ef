"""The mutation tester: which mutants it makes, and that a mutant is in the running code."""

import importlib.util
import json
import sys

import pytest


@pytest.fixture(scope="module")
def mutation(repository):
    path = repository / "benchmarks" / "mutation.py"
    spec = importlib.util.spec_from_file_location("mutation_tester", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


SOURCE = '''
import functools

LIMIT = 3


def plain(a, b=2):
    """Adds."""
    if a > 1:
        raise ValueError("too large" + str(a))
    print("sum", a + 1)
    return a + b


class Box:
    size = 1 + 1

    @property
    @functools.lru_cache
    def wide(self) -> int:
        return 1

    @classmethod
    def named(cls, key: str = "a") -> str:
        def inner():
            return key + "x"

        return inner() + "two words"
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "one.py"
    path.write_text(SOURCE)
    return path


def test_mutants_are_expressions_of_functions_less_what_the_rules_leave_out(mutation, file):
    made = {(m.function, m.before, m.after) for m in mutation.mutants_of("one", file)}
    assert ("plain", "a + b", "a - b") in made
    assert ("plain", " > 1", " >= 1") in made
    assert ("Box.wide", "1", "2") in made  # decorated
    assert ("Box.named", '"x"', '"xXX"') in made  # nested
    changed = {before for _, before, _ in made}
    assert not changed & {"3", "1 + 1", '"too large"', "a + 1", '"a"', "int"}
    assert not any("two wordsXX" in after for _, _, after in made)


def test_mutant_is_in_every_living_function(mutation, file):
    spec = importlib.util.spec_from_file_location("one", file)
    one = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(one)
    made = mutation.mutants_of("one", file)
    living = mutation.living_functions(file)
    held = one.plain  # a reference that another module may hold
    swap = next(m for m in made if (m.before, m.after) == ("a + b", "a - b"))
    assert held(1) == 3
    assert mutation.put_in(file, swap, living)
    assert held(1) == -1
    wide = next(m for m in made if (m.function, m.after) == ("Box.wide", "2"))
    assert mutation.put_in(file, wide, living)
    assert one.Box().wide == 2
    inner = next(m for m in made if m.after == '"xXX"')
    assert mutation.put_in(file, inner, living)
    assert one.Box.named("k").startswith("kxXX")


def test_samples_are_the_same_as_long_as_the_function_is(mutation, file):
    made = mutation.mutants_of("one", file)
    few = mutation.sample_of(made, 4, seed=0)
    assert [m.key for m in few] == [m.key for m in mutation.sample_of(made, 9, seed=0)[:4]]
    assert [m.key for m in few] != [m.key for m in mutation.sample_of(made, 4, seed=1)]
    assert len(mutation.sample_of(made, 0, seed=0)) == len(made)
    before = {m.key for m in made if m.function == "plain"}
    file.write_text(SOURCE.replace("return 1", "return 5"))
    again = mutation.mutants_of("one", file)
    assert {m.key for m in again if m.function == "plain"} == before
    assert not {m.key for m in again if m.function == "Box.wide"} & {m.key for m in made}


def test_table_counts_the_last_verdict_and_leaves_equal_code_out(mutation, file, tmp_path):
    made = mutation.mutants_of("one", file)[:4]
    outcomes = ("survived", "killed", "timeout", "none", "killed")  # the first is run again
    kept = tmp_path / "mutants.jsonl"
    with kept.open("w") as lines:
        for mutant, outcome in zip([*made, made[0]], outcomes, strict=True):
            verdict = {
                "key": mutant.key,
                "module": "one",
                "function": mutant.function,
                "line": mutant.line,
                "before": mutant.before,
                "after": mutant.after,
                "outcome": outcome,
                "tests": 1,
            }
            lines.write(f"{json.dumps(verdict)}\n")
    found = mutation.table({"one": made}, mutation.verdicts_in(kept))
    assert "| one | 3 | 2 | 1 | 0 | 100% |" in found


def test_every_module_is_tested(mutation):
    for name in mutation.MODULES:
        assert mutation.path_of(name).exists(), name
        assert mutation.tests_of(name), name
