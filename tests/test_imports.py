"""The method stands on its own: six files that a reader can lift out."""

import ast
import sys
from pathlib import Path

import pytest

METHOD = {"distill", "flow", "stream", "model", "syncnet", "kernels"}
LIBRARIES = {"torch", "numpy", "triton"} | sys.stdlib_module_names
FROM_RUNTIME = {"autocast", "fast_dtype"}
FILES = {"os", "io", "pathlib", "shutil", "tempfile", "json", "subprocess", "argparse"}
MAIN_JOB = {"faces", "media", "metrics", "runtime", "pathlib"}  # what distill's main needs


def imports(name):
    """{module: the names that are imported from it, or nothing for all of it} of NAME.py."""
    tree = ast.parse((Path(__file__).parents[1] / f"{name}.py").read_text("utf-8"))
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update({alias.name.split(".")[0]: set() for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found.setdefault(node.module.split(".")[0], set()).update(names)
    return found


@pytest.mark.parametrize("name", sorted(METHOD))
def test_the_method_knows_nothing_of_files_options_or_a_user(name):
    found = imports(name)
    assert found and name not in found
    allowed = METHOD | {"data"} | LIBRARIES - FILES
    if name == "distill":
        allowed |= MAIN_JOB
    elif "runtime" in found:
        assert found.pop("runtime") <= FROM_RUNTIME
    assert set(found) <= allowed


def test_data_stands_below_all():
    assert set(imports("data")) <= LIBRARIES - FILES


def test_nothing_below_imports_what_is_above():
    """In this order, a file imports those before it alone."""
    order = ["data", "model", "flow", "stream", "syncnet", "distill"]
    for place, name in enumerate(order):
        assert not set(imports(name)) & set(order[place:]), name
