"""What torch, torchvision and timm offer by name, read from their sources.

Importing them takes seconds, and a misspelt name should be answered at once.
"""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

# They need a closure, or gradients that are sparse.
_OTHER_LOOPS = {"LBFGS", "SparseAdam"}
# Parsing the thousands of lines of timm's models would take seconds.
_TIMMS = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)


def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers and segmentation models."""
    models = _directory("torchvision") / "models"
    names = {
        node.name
        for file in (*models.glob("*.py"), *(models / "segmentation").glob("*.py"))
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and _is_registered(node)
    }
    return tuple(sorted(names))


def timm_names() -> tuple[str, ...]:
    """Return the names of timm's models; none if it is not installed."""
    if find_spec("timm") is None:
        return ()
    files = (_directory("timm") / "models").glob("*.py")
    names = {name for file in files for name in _TIMMS.findall(file.read_text(encoding="utf-8"))}
    return tuple(sorted(names))


def optimizer_names() -> tuple[str, ...]:
    """Return the names of torch's optimizers that a plain step can use."""
    tree = ast.parse((_directory("torch") / "optim" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    classes = {name for name in names if name[0].isupper()}
    return tuple(sorted(classes - {"Optimizer"} - _OTHER_LOOPS))


def _is_registered(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "register_model"
        for decorator in function.decorator_list
    )


def _directory(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
