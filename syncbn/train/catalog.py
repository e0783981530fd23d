"""What torch, torchvision and timm offer by name, read from their sources.

Importing them takes seconds, and a misspelt name should be answered at once.
"""

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# They need a closure, or gradients that are sparse.
_OTHER_LOOPS = {"LBFGS", "SparseAdam"}
# Parsing the thousands of lines of timm's models would take seconds.
_TIMMS = re.compile(r"^@register_model\ndef (\w+)\(", re.MULTILINE)


@cache
def torchvision_names() -> tuple[str, ...]:
    """Return the names of torchvision's image classifiers and segmentation models."""
    classifiers = _registered_in(_directory("torchvision") / "models")
    return tuple(sorted(classifiers | set(torchvision_segmenters())))


@cache
def torchvision_segmenters() -> tuple[str, ...]:
    """Return the names of torchvision's segmentation models."""
    return tuple(sorted(_registered_in(_directory("torchvision") / "models" / "segmentation")))


def timm_names() -> tuple[str, ...]:
    """Return the names of timm's models; none if it is not installed."""
    return () if find_spec("timm") is None else _registered_in_timm()


@cache
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


@cache
def optimizer_arguments() -> dict[str, tuple[str, ...]]:
    """Return the names of the arguments of each optimizer of `optimizer_names`, but for lr."""
    found: dict[str, tuple[str, ...]] = {}
    for file in (_directory("torch") / "optim").glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name in optimizer_names():
                (init,) = (
                    each
                    for each in node.body
                    if isinstance(each, ast.FunctionDef) and each.name == "__init__"
                )
                names = [each.arg for each in (*init.args.args, *init.args.kwonlyargs)]
                found[node.name] = tuple(n for n in names if n not in ("self", "params", "lr"))
    return dict(sorted(found.items()))


@cache
def _registered_in_timm() -> tuple[str, ...]:
    files = (_directory("timm") / "models").glob("*.py")
    names = {name for file in files for name in _TIMMS.findall(file.read_text(encoding="utf-8"))}
    return tuple(sorted(names))


def _registered_in(directory: Path) -> set[str]:
    """Return the names of the models in torchvision's files of a directory."""
    return {
        node.name
        for file in directory.glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and _is_registered(node)
    }


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
