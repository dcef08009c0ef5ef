"""The pins: constraints.txt, the hashes of requirements.lock, the ranges of pyproject.toml."""

import importlib.metadata
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

# Their builds differ between package indexes, so they are pinned without hashes.
WITHOUT_HASHES = {"torch", "torchvision"}


@pytest.fixture(scope="module")
def pins(repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def locked(repository):
    """Lines of requirements.lock, by name: version, marker and hashes."""
    text = (repository / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    parts = {}
    for line in lines:
        requirement = Requirement(line.partition("--hash")[0])
        hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line)
        parts[canonicalize_name(requirement.name)] = requirement, hashes
    assert len(parts) == len(lines)
    return parts


def test_lock_has_every_pin_but_those_of_torch(pins, locked):
    """If this fails after a change of constraints.txt, run `make lock`."""
    for name, (requirement, hashes) in locked.items():
        assert hashes, name
        if name in pins:
            assert str(requirement.specifier) == f"=={pins[name]}", name
        else:  # only for another operating system or Python
            assert requirement.marker is not None, name
    assert pins.keys() - locked.keys() == WITHOUT_HASHES


def test_lock_names_no_package_index(repository):
    assert "://" not in (repository / "requirements.lock").read_text()


def test_ranges_of_the_package_admit_the_pins(pins, repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in (*project["dependencies"], *(text for extra in extras for text in extra)):
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_pins_can_be_installed_with_the_oldest_python(pins, repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    oldest = project["requires-python"].removeprefix(">=") + ".0"
    for name, version in pins.items():
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if found.version.partition("+")[0] == version:
            allowed = SpecifierSet(found.metadata.get("Requires-Python") or "")
            assert allowed.contains(oldest), f"{name} {version} needs Python {allowed}"
