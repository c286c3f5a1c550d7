"""What `import kdecore` brings in, and what it offers."""

import inspect
import subprocess
import sys

import pytest

import kdecore


def test_importing_kdecore_imports_no_library_that_it_can_do_without():
    program = (
        "import sys, kdecore; print(*(m for m in ('torch', 'cupy', 'sklearn', 'array_api_strict') if m in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == []
    assert result.stderr == ""


def test_attention_on_numpy_imports_neither_torch_nor_cupy():
    program = (
        "import sys, numpy, kdecore; x = numpy.ones((40, 2)); kdecore.attention(x, x, x, method='sortlsh', budget=8);"
        "print(*(m for m in ('torch', 'cupy') if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == []


def test_public_names_exist_and_are_sorted():
    assert kdecore.__all__ == sorted(kdecore.__all__)
    assert len(set(kdecore.__all__)) == len(kdecore.__all__)
    for name in kdecore.__all__:
        assert getattr(kdecore, name).__module__.startswith("kdecore.")
        assert inspect.getdoc(getattr(kdecore, name))


def test_nothing_else_looks_public():
    modules = {name for name, value in vars(kdecore).items() if inspect.ismodule(value)}
    names = {name for name in vars(kdecore) if not name.startswith("_")} - modules
    assert names == set(kdecore.__all__)


def test_attention_is_the_function_and_not_its_module():
    assert callable(kdecore.attention)
    assert inspect.isfunction(kdecore.attention)


FUNCTIONS = [value for name in kdecore.__all__ if inspect.isfunction(value := getattr(kdecore, name))]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_public_functions_document_parameters_results_and_errors(function):
    doc = inspect.getdoc(function)
    for section in ("Parameters", "Returns", "Raises"):
        assert f"\n{section}\n{'-' * len(section)}\n" in doc
    for name in inspect.signature(function).parameters:
        assert f"\n{name}\n" in doc, f"{name} is not documented"


def test_the_docstring_example_runs():
    import doctest

    import kdecore.api.attention as _  # noqa: F401

    results = doctest.testmod(sys.modules["kdecore.api.attention"])
    assert results.attempted > 0
    assert results.failed == 0
