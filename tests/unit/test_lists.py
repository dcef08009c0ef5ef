"""The command that lists what there is."""

import pytest

from robsparse.base import registry
from robsparse.cli.main import main


def listed(capsys, *words):
    assert main(["list", *words]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("kind", "registered"),
    [("methods", "method"), ("attacks", "attack"), ("datasets", "dataset"), ("archs", "arch")],
)
def test_each_registered_name_has_one_line_with_a_sentence(kind, registered, capsys):
    lines = listed(capsys, kind)
    assert [line.split()[0] for line in lines] == registry.names(registered)
    assert all(len(line.split()) > 3 for line in lines)


def test_studies_have_a_title_and_a_bad_one_its_error(tmp_path, capsys, repository, monkeypatch):
    monkeypatch.chdir(repository)
    (tmp_path / "good.yaml").write_text((repository / "config" / "tiny.yaml").read_text())
    (tmp_path / "bad.yaml").write_text("study: x\n")
    bad, good = listed(capsys, "studies", "--config-dir", str(tmp_path))
    assert bad.split("  ", 1)[1].strip().startswith("not valid: ")
    assert good.endswith("good.yaml  Workflow test on 8x8 handwritten digits (10 networks)")


def test_without_a_kind_everything_is_listed_under_headings(capsys, repository, monkeypatch):
    monkeypatch.chdir(repository)
    lines = listed(capsys)
    for heading in ("methods", "attacks", "datasets", "archs", "studies"):
        assert heading in lines
    assert any(line.startswith("config/quick.yaml") for line in lines)
