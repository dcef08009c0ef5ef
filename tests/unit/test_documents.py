"""What the documents say exists: commands, options, keys of a study, names, and numbers."""

import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
import yaml

from robsparse.base import registry
from robsparse.cli.main import _parser, main
from robsparse.figures.data import reliability
from robsparse.records.columns import COLLECTED, OVERLAP_COLUMNS
from robsparse.records.rows import Row
from robsparse.schema import json_schema

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".github/**/*.md")])
    if path.name != "CHANGELOG.md"  # it names what earlier versions had
}
# Pages that name modules like `evaluation.cache`, and keys of made-up studies.
MODULES = {"mutation.md", "staleness.md"}


FENCE = re.compile(r"^ *```(\w*)[^`\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def code(text):
    """The lines of the shell blocks of a page, and its code spans."""
    blocks = [body for language, body in FENCE.findall(text) if language in ("", "sh")]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    return lines, [" ".join(span.split()) for span in spans]


# ---------------------------------------------------------------- commands


def parsers():
    [commands] = [a for a in _parser()._actions if hasattr(a, "choices") and a.choices]
    return commands.choices


COMMANDS = {name: set(parser._option_string_actions) for name, parser in parsers().items()}


def calls(text):
    """The words of each call of `robsparse` in a piece of code."""
    for call in re.findall(r"(?<![\w./-])robsparse ([^;&|]*)", text):
        try:
            words = shlex.split(call, comments=True)
        except ValueError:
            words = call.split()
        if words and not words[0].startswith("-"):
            yield words


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_exists(page):
    lines, spans = code(PAGES[page])
    for text in [*lines, *spans]:
        for command, *words in calls(text):
            if command in ("CASE", "COMMAND"):
                continue
            assert command in COMMANDS, f"{page}: robsparse {command}"
            own = words[: words.index("--")] if "--" in words else words
            options = {word.split("=")[0] for word in own if word.startswith("--")}
            assert options <= COMMANDS[command], f"{page}: {text}"


def test_the_page_of_commands_names_all_of_them():
    table, _ = PAGES["commands.md"].split("## ", 1)
    named = {command for span in code(table)[1] for command, *_ in calls(span)}
    assert set(COMMANDS) - named == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_complete_command_is_accepted(page, capsys):
    """The lines of code blocks; words such as $case stand for others."""
    lines, _ = code(PAGES[page])
    for line in lines:
        if line.startswith("robsparse ") and "$" not in line:
            words = shlex.split(line, comments=True)[1:]
            try:
                _parser().parse_args(words)
            except SystemExit as stopped:
                pytest.fail(f"{page}: {line}: {capsys.readouterr().err}", pytrace=stopped.code == 0)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_stands_alone_exists(page):
    known = set().union(*COMMANDS.values(), {"--cores", "--configfile", "--profile"})
    _, spans = code(PAGES[page])
    for span in spans:
        if re.match(r"--\w", span):
            assert span.split()[0].split("=")[0] in known, f"{page}: {span}"


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page):
    rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    lines, spans = code(PAGES[page])
    for text in [*lines, *spans]:
        for target in re.findall(r"^make ([a-z]+)", text):
            assert target in rules, f"{page}: {text}"


@pytest.mark.parametrize("page", PAGES)
def test_every_file_in_a_command_exists(page):
    """Except those that the reader writes."""
    lines, spans = code(PAGES[page])
    named = re.compile(
        r"(?<![\w./-])((?:config|benchmarks|tests|results/reference|examples)/[\w./-]+)"
    )
    for text in [*lines, *spans]:
        for name in named.findall(text):
            if not re.search(r"mine|photos$", name):
                assert (ROOT / name.rstrip(".")).exists(), f"{page}: {name}"


# ---------------------------------------------------------------- keys of a study

SCHEMA = json_schema.build()


def below(schema, key):
    """The schemas of a key of a mapping; [] if there is no such key."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].removeprefix(json_schema.REFERENCE)]
    if key.startswith("<") or key.isupper():  # any name
        return [*schema.get("properties", {}).values()]
    found = []
    for form in schema.get("anyOf", []):
        found += below(form, key)
    if "items" in schema:
        found += below(schema["items"], key)
    if key in schema.get("properties", {}):
        found.append(schema["properties"][key])
    elif isinstance(schema.get("additionalProperties"), dict):
        found.append(schema["additionalProperties"])
    return found


def is_known(path):
    schemas = [SCHEMA]
    for key in path:
        schemas = [inner for schema in schemas for inner in below(schema, key)]
    return bool(schemas)


def test_a_key_is_looked_up_at_its_place():
    assert is_known(["training", "crafting", "steps"])
    assert is_known(["grid", "budget", "unit"])
    assert is_known(["methods", "admm", "retrain", "epochs"])
    assert not is_known(["training", "stepss"])
    assert not is_known(["training", "crafting", "epochs"])
    assert not is_known(["machine", "device", "name"])


@pytest.mark.parametrize("page", sorted(set(PAGES) - MODULES))
def test_every_key_with_its_section_exists(page):
    _, spans = code(PAGES[page])
    for span in spans:
        found = re.match(r"([a-z]+(?:\.[\w<>]+)+)(?=:|$)", span)
        is_file = found and found[1].endswith((".py", ".json"))
        if found and not is_file and found[1].split(".")[0] in SCHEMA["properties"]:
            assert is_known(found[1].split(".")), f"{page}: {span}"


def keys(value, path=()):
    """The paths of all keys of a mapping."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, str(key))
            yield from keys(inner, (*path, str(key)))
    if isinstance(value, list):
        for inner in value:
            yield from keys(inner, path)


@pytest.mark.parametrize("page", PAGES)
def test_every_key_of_a_study_in_a_block_exists(page):
    for block in re.findall(r"^```yaml\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        study = yaml.safe_load(block)
        if page == "cluster.md" and "groups" in study:  # lines of a profile of Snakemake
            continue
        for path in keys(study):
            own = path[:2] == ("methods", "scaled_magnitude") or path[:2] == (
                "methods",
                "bcs_reset",
            )
            assert own or is_known(path), f"{page}: {'.'.join(path)}"


def test_the_study_of_the_walk_through_is_valid(tmp_path, capsys):
    [lines, _] = re.findall(r"^```yaml\n(.*?)^```$", PAGES["study.md"], re.MULTILINE | re.DOTALL)
    changed = yaml.safe_load(lines)
    study = yaml.safe_load((ROOT / "config" / "quick.yaml").read_text(encoding="utf-8"))
    study["grid"] |= changed.pop("grid")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(study | changed), encoding="utf-8")
    assert main(["check", str(tmp_path / "mine.yaml")]) == 0
    assert "valid, 6 networks" in capsys.readouterr().out


# ---------------------------------------------------------------- names and numbers


@pytest.mark.parametrize("kind", ["method", "arch", "dataset"])
def test_the_page_of_studies_names_every_part(kind):
    [row] = [
        line for line in PAGES["study.md"].splitlines() if line.startswith(f"| `grid.{kind}s`")
    ]
    assert set(registry.names(kind)) - set(re.findall(r"`(\w+)`", row)) == set()


def test_the_page_of_studies_names_every_study_and_every_result():
    text = PAGES["study.md"]
    assert {p.name for p in ROOT.glob("config/*.yaml")} - set(
        re.findall(r"`(\w+\.yaml)`", text)
    ) == set()
    assert set(COLLECTED) - set(re.findall(r"`([\w.]+)`", text)) == set()


def test_the_page_of_attacks_names_every_attack():
    table = re.findall(r"^\| `(\w+)` \|", PAGES["evaluation.md"], re.MULTILINE)
    assert set(registry.names("attack")) - set(table) == set()


def columns():
    """All columns of the collected and the printed tables of the committed runs."""
    frames = ROOT.glob("results/reference/*/**/*.csv")
    heads = {name for path in frames for name in path.read_text().split("\n", 1)[0].split(",")}
    return heads | {*Row.model_fields, *OVERLAP_COLUMNS}


@pytest.mark.parametrize("page", PAGES)
def test_every_column_exists(page):
    text = " ".join(PAGES[page].split())
    for group in re.findall(r"\bcolumns? ((?:`\w+`(?:, | and )?)+)", text):
        assert set(re.findall(r"`(\w+)`", group)) <= columns(), f"{page}: {group}"


def percent(values):
    return f"{100 * values.mean():.1f} ± {100 * values.std():.1f}"


def committed_rows():
    """The rows of the table of the README, computed from the rows of the committed run."""
    frame = pd.read_csv(ROOT / "results/reference/quick/results.csv")
    frame = frame[(frame.selection == "best_val") & (frame.component == "all")]
    frame["potentially_unreliable"] = frame.potentially_unreliable.fillna("")
    marks = {reliability.FINE: "", reliability.LOOK: " °", reliability.UNRELIABLE: " †"}
    for (_, sparsity), rows in frame.groupby(["method", "sparsity"], sort=False):
        attacks = dict(iter(rows.groupby("attack")))
        grades = (
            reliability.grade(row.potentially_unreliable, row.n_examples)
            for row in attacks["autoattack"].itertuples()
        )
        mark = marks[reliability.worst(grades)]
        first = rows.iloc[0]
        yield (
            first.method,
            f"{100 * sparsity:.0f} %",
            percent(attacks["clean"].accuracy),
            percent(attacks["pgd"].accuracy) + mark,
            percent(attacks["autoattack"].accuracy) + mark,
            f"{first.nonzero:,}",
            f"{first.peak_active_weights:,}",
        )


def test_the_table_of_the_readme_has_the_numbers_of_the_committed_run():
    head, *_ = PAGES["README.md"].split("## Where everything is")
    lines = re.findall(r"^\| (\w+ \| \d+ % .*) \|$", head, re.MULTILINE)
    printed = [tuple(cell.strip() for cell in line.split("|")) for line in lines]
    printed = [(method.lower(), *rest) for method, *rest in printed]
    assert sorted(printed) == sorted(committed_rows())
