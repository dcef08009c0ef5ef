"""`import robsparse`: it offers functions and loads their libraries at the first use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import robsparse


def test_import_is_free_of_torch_and_pandas_until_a_function_is_used():
    code = (
        "import sys, robsparse\n"
        "assert 'load' in dir(robsparse)\n"
        "assert not {'torch', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "robsparse.load\n"
        "assert 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_stub_declares_exactly_the_functions():
    stub = Path(robsparse.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    imported = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(stub))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    functions = {n: m for n, m in imported.items() if n.islower()}
    assert functions == robsparse._FUNCTIONS


@pytest.mark.parametrize("name", robsparse._FUNCTIONS)
def test_function_has_a_docstring(name):
    assert getattr(robsparse, name).__doc__


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'robsparse' has no attribute 'lod'"):
        _ = robsparse.lod
