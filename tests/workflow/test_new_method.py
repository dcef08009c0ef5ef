"""docs/new_method.md, new_network.md: they are run; what they say about names is complete."""

import ast
import dataclasses
import re
import tomllib
from collections import Counter

import pytest
import torch
import yaml

import one_tree
from robsparse import models
from robsparse.base import registry
from robsparse.schema.external import External
from robsparse.training.stages import Run, Stage


@pytest.fixture(scope="module")
def text(repository):
    return (repository / "docs" / "new_method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def blocks(text):
    """blocks(language) -> the texts of the code blocks in this language, in their order."""
    return code_blocks(text)


@pytest.fixture(scope="module")
def blocks_of_networks(repository):
    """The code blocks of the page on networks that were trained elsewhere."""
    return code_blocks((repository / "docs" / "new_network.md").read_text(encoding="utf-8"))


def code_blocks(text):
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return lambda *languages: [(name, body) for name, body in found if name in languages]


def small(study):
    """The quick study with a small network, few epochs and images: the page copies this file."""
    study["archs"]["small_cnn"]["width"] = 4
    study["datasets"]["digits"] |= {"validation_examples": 300, "test_examples": 800}
    study["training"] |= {"batch_size": 128}
    study["training"]["crafting"]["steps"] = study["training"]["validation"]["steps"] = 2
    for stages in study["methods"].values():
        for stage in stages.values():
            if isinstance(stage, dict):
                stage["epochs"] = 2
    sizes = {"n_examples": 10, "batch_size": 10, "sanity_checks": {"n_examples": 0}}
    study["evaluation"] |= sizes
    del study["evaluation"]["selections"]["last"]
    return study


def merged(below, above):
    """A mapping with the values of both, as the page asks for: change lines, and add others."""
    both = dict(below)
    for key, value in above.items():
        inner = isinstance(value, dict) and isinstance(below.get(key), dict)
        both[key] = merged(below[key], value) if inner else value
    return both


def weights(path):
    """Somebody else's file of weights, which the page attacks."""
    path.parent.mkdir()
    params = registry.entry("arch", "small_cnn").params()
    torch.save(models.build("small_cnn", params, (1, 8, 8), 10).state_dict(), path)


def test_the_page_runs_from_its_first_command_to_its_last(
    blocks, blocks_of_networks, tmp_path, project, repository
):
    """Only the file that it copies, config/quick.yaml, is smaller here.

    The last command is the first one of the page on networks that were trained elsewhere.
    """
    one_tree.build(tmp_path / "tree")
    quick = project.root / "config" / "quick.yaml"
    quick.write_text(yaml.safe_dump(small(yaml.safe_load(quick.read_text())), sort_keys=False))
    for name in ("tests", "pyproject.toml"):
        (project.root / name).symlink_to(repository / name)
    weights(project.root / "weights" / "theirs.pt")
    method = tmp_path / "tree" / "robsparse" / "baselines" / "scaled_magnitude.py"
    (_, code), *_ = blocks("python")
    (_, lines), *_ = blocks("yaml")
    pages = [*blocks("sh"), blocks_of_networks("sh")[0]]
    commands = [line for _, body in pages for line in body.splitlines() if line]
    assert commands[0].startswith("robsparse new-method scaled_magnitude")
    printed = {}
    for command in commands:
        done = project.run("bash", "-c", command, PYTHONPATH=str(tmp_path / "tree"))
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        printed[command.split("--")[0].strip()] = done.stdout
        if command == commands[0]:
            assert method.exists()
            method.write_text(code)
            study = merged(yaml.safe_load(quick.read_text()), yaml.safe_load(lines))
            (project.root / "config" / "mine.yaml").write_text(yaml.safe_dump(study))
    table = printed["robsparse run config/mine.yaml"]
    assert "| Scaled magnitude |" in " ".join(table.split())
    assert (
        " passed"
        in printed["python -m pytest -q tests/contract/test_methods.py -k scaled_magnitude"]
    )
    assert (project.root / "results/mine/report.md").exists()
    assert (project.root / "weights/theirs.pt.Linf-0.15.evaluation.json").exists()


def test_the_rule_between_two_parameters_works_in_a_method(blocks, text, tmp_path, monkeypatch):
    [(_, rule)] = blocks("python")[1:]
    imports = [line for line in re.findall(r"`(from [^`]+)`", text) if "import" in line]
    assert len(imports) == 2
    head = "\n".join([*imports, "from robsparse.schema import Strict"])
    path = tmp_path / "ruled.py"
    path.write_text(f'"""A method."""\n\n{head}\n\n\n{rule}')
    [entry] = registry._read("method", "ruled", path, None)
    assert entry.params(begin=0.2, end=0.3).begin == 0.2
    with pytest.raises(ValueError, match=r"expected begin to be less than end = 0\.1"):
        entry.params(begin=0.2, end=0.1)


def test_the_entry_point_is_in_the_group_that_the_suite_reads(blocks):
    [(_, body)] = blocks("toml")
    assert set(tomllib.loads(body)["project"]["entry-points"]) == {registry.ENTRY_POINTS["method"]}


def test_the_external_models_have_a_valid_form(blocks_of_networks):
    [(_, body)] = blocks_of_networks("yaml")
    for name, model in yaml.safe_load(body)["models"].items():
        assert External.model_validate(model).source.external, name


def test_every_hook_and_every_attribute_of_a_run_is_documented(text):
    hooks = {name for name in vars(Stage) if not name.startswith("_")}
    missing = [name for name in hooks if not re.search(rf"`{name}\b", text)]
    attributes = {field.name for field in dataclasses.fields(Run)} | {"gamma", "exported"}
    missing += [name for name in attributes if f"`run.{name}`" not in text]
    assert missing == []


def test_every_helper_of_the_page_exists(text):
    table = text.split("### Helpers\n\n")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert len(rows) >= 7
    for row in rows:
        *names, module = re.findall(r"`([\w.]+)", row)
        source = one_tree.ROOT / f"{module.replace('.', '/')}.py"
        for name in names:
            assert re.search(rf"^(?:def|class) {name}\b", source.read_text(), re.MULTILINE), name


def test_every_helper_that_two_methods_use_is_on_the_page(text, repository):
    packages = ("robsparse.base", "robsparse.sparsity", "robsparse.training")
    used = Counter()
    for path in (repository / "baselines").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith(packages):
                used.update(alias.name for alias in node.names)
    # Classes that are explained elsewhere, and what is special to two methods of one kind.
    elsewhere = {"Prunable", "FlyingBirdStage", "density", "round_to_sum"}
    names = {name for name, count in used.items() if count > 1} - elsewhere
    assert {name for name in names if not re.search(rf"`{name}\b", text)} == set()
