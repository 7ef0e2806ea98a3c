"""Every package that is imported is named in pyproject.toml, and nothing else is."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TOOLS = {"pyright", "pytest-timeout", "ruff"}
"""Of the tests: run, not imported."""

KERNELS = {"flashinfer", "sgl_kernel"}
"""Rivals in a benchmark: SGLang's own kernels, under the version that it brings."""

ASKED_FOR = {"lm_eval"}
"""A benchmark of it says how to install it, since it brings much that nothing else needs."""


def imported(*folders: str) -> set[str]:
    """The distributions that Python files in these folders import from."""
    of_module = packages_distributions()
    own = {path.stem for path in ROOT.glob("[bst]*/**/*.py")} | {"sglang_batchllm"}
    modules = {
        name.partition(".")[0]
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        for name in modules_in(ast.parse(path.read_text(encoding="utf-8")))
    }
    foreign = modules - set(sys.stdlib_module_names) - own - KERNELS - ASKED_FOR
    return {normal(of_module[module][0]) for module in foreign}


def modules_in(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def named(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_package_names_what_it_imports():
    extra = named(PROJECT["optional-dependencies"]["ray"])
    assert imported("python") == named(PROJECT["dependencies"]) | extra


def test_tests_scripts_and_benchmarks_name_what_they_import():
    others = imported("test", "scripts", "benchmark", "examples")
    beside = named(PROJECT["optional-dependencies"]["test"])
    assert others - named(PROJECT["dependencies"]) == beside - TOOLS
