"""Whether the Python code of a forward does nothing but the calls that a trace of it records.

A trace runs a forward once, on stand-ins for its tensors. It loses what the code does besides
calling PyTorch, and takes for constant what the code reads from elsewhere. So the code that ran is
checked afterwards: it may read attributes of modules, which the caller compares at each call, and
nothing else that can change.
"""

import dis
import enum
import functools
import gc
import inspect
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from syncbn.transforms.tracing import KeptError

_OURS = __name__.rpartition(".")[0]
_TRACING = fx.Tracer.__module__  # what calls a forward while it is traced
_FORBIDDEN = {
    "STORE_ATTR": "sets an attribute",
    "DELETE_ATTR": "deletes an attribute",
    "STORE_GLOBAL": "sets a global",
    "DELETE_GLOBAL": "deletes a global",
    "IMPORT_NAME": "imports a module",
    "PUSH_EXC_INFO": "has a with or try statement",
}
# Methods that change, or read, what no trace shows.
_UNTRACED = ("__enter__", "__exit__", "__getattribute__")
_FUNCTIONS = (len, isinstance, min, max, sum, abs, all, any, sorted, pow, round, divmod)
# Their results would describe the stand-in.
_REVEALING_CLASSES = (type, str, bytes, bytearray, memoryview, object)
_PURE_MODULES = ("builtins", "collections", "itertools", "math", "_operator")
_CONSTANTS = (torch.dtype, torch.memory_format, torch.layout, enum.Enum)


class Watch(TorchFunctionMode):
    """Remembers the code that runs inside of it, and refuses torch functions without stand-ins.

    Attributes:
        codes: each code object outside torch and the standard library that ran, for each closure
            of it, with what its names stand for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.codes: dict[tuple[CodeType, tuple[int, ...]], dict[str, Any]] = {}
        self._before: Any = None
        self._collects = True
        self._called_by_others: dict[str, str] = {}

    def __enter__(self) -> "Watch":
        super().__enter__()
        # What the garbage collector calls, such as a test's own clock, is not the forward's code.
        self._collects = gc.isenabled()
        gc.disable()
        self._before = sys.getprofile()
        sys.setprofile(self._record)
        return self

    def __exit__(self, *exception: Any) -> None:
        sys.setprofile(self._before)
        if self._collects:
            gc.enable()
        super().__exit__(*exception)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        values = pytree.tree_leaves((args, kwargs))
        if not any(isinstance(value, fx.Proxy) for value in values):
            name = getattr(func, "__name__", func)
            raise KeptError(f"its forward calls {name} without any of its inputs")
        return func(*args, **(kwargs or {}))

    def _record(self, frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and not _is_library(frame.f_globals):
            caller = {} if frame.f_back is None else frame.f_back.f_globals
            if _is_library(caller) and caller.get("__name__") != _TRACING:
                self._called_by_others[code.co_name] = str(caller.get("__name__"))
            free = {name: frame.f_locals.get(name) for name in code.co_freevars}
            closure = tuple(map(id, free.values()))
            self.codes[code, closure] = {**frame.f_builtins, **frame.f_globals, **free}

    def check(self) -> frozenset[str]:
        """Return the names of all attributes that the code reads.

        Raises:
            KeptError: the code does more than to read attributes and to call functions of torch.
        """
        # What stands between two functions of the model, such as the decorator torch.autocast, may
        # set what a trace does not record.
        for function, module in self._called_by_others.items():
            raise KeptError(
                f"{function}() in its model is called by {module}, as a decorator would"
            )
        names: set[str] = set()
        values: list[Any] = []
        for (code, _), scope in self.codes.items():
            names.update(_check_code(code, scope, values))
        for kind in values:
            if isinstance(kind, type) and not _is_library({"__name__": kind.__module__}):
                _check_class(kind, names)
        return frozenset(names)


def is_from_torch(frame: FrameType) -> bool:
    """Return whether a frame runs torch's own code."""
    return _package(frame.f_globals) == "torch"


def _package(scope: dict[str, Any]) -> str:
    return str(scope.get("__name__", "")).partition(".")[0]


def _is_library(scope: dict[str, Any]) -> bool:
    """Return whether code with these globals is torch's, ours or the standard library's."""
    package, module = _package(scope), str(scope.get("__name__", ""))
    ours = module == _OURS or module.startswith(f"{_OURS}.")
    named_tuple = package.startswith("namedtuple_")
    return package == "torch" or package in sys.stdlib_module_names or ours or named_tuple


def _check_class(kind: type, names: set[str]) -> None:
    """Raise if a class has data under one of the names, which some code may read off it."""
    for each in kind.__mro__:
        for name in names & vars(each).keys() if each.__module__ != "builtins" else ():
            if not hasattr(type(vars(each)[name]), "__get__"):
                raise KeptError(f"its model's forward may read {kind.__name__}.{name}")


def _check_code(code: CodeType, scope: dict[str, Any], values: list[Any]) -> set[str]:
    """Return the attributes that a code object reads, or raise what else it does.

    What its names stand for is added to the values.
    """
    names: set[str] = set()
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for number, step in enumerate(steps):
        if step.opname in _FORBIDDEN:
            raise KeptError(f"{code.co_name}() in its model {_FORBIDDEN[step.opname]}")
        if step.opname == "IS_OP" and not _is_none(steps[number - 1]):
            raise KeptError(f"{code.co_name}() in its model compares identities")
        if step.opname == "STORE_DEREF" and step.argval in code.co_freevars:
            raise KeptError(f"{code.co_name}() in its model sets {step.argval!r} outside of it")
        if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if step.argval in _UNTRACED:
                raise KeptError(f"{code.co_name}() in its model calls {step.argval}")
            names.add(step.argval)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
            step.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and step.argval in code.co_freevars
        ):
            values.append(_check_name(code, scope, steps[number:]))
    return names


def _is_none(step: dis.Instruction) -> bool:
    return step.opname.startswith("LOAD_CONST") and step.argval is None


def _check_name(code: CodeType, scope: dict[str, Any], steps: list[dis.Instruction]) -> Any:
    """Return what a name stands for, with the attributes read of it; raise if it can change."""
    path = [str(steps[0].argval)]
    value = scope.get(path[0])
    for step in steps[1:]:
        attribute = step.opname in ("LOAD_ATTR", "LOAD_METHOD")
        if not attribute or not isinstance(value, (ModuleType, type)):
            break
        path.append(step.argval)
        value = inspect.getattr_static(value, step.argval, None)
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
    if not is_constant(value):
        raise KeptError(f"{code.co_name}() in its model uses {'.'.join(path)!r}")
    return value


def is_constant(value: Any) -> bool:
    """Return whether a value is a class, a function that does nothing unseen, or a constant."""
    if isinstance(value, type):
        library = _is_library({"__name__": value.__module__})
        known = not library or value.__module__ in _PURE_MODULES or _is_torchs(value)
        return known and value not in _REVEALING_CLASSES
    if isinstance(value, FunctionType) and not _is_library(value.__globals__):
        # Its code is checked when it runs.
        marks = all(name.startswith(("__", "_torch")) for name in vars(value))
        return marks and _has_constant_defaults(value)
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        known = value in _FUNCTIONS or value in _torch_functions()
        return known or (value.__module__ in _PURE_MODULES and value.__module__ != "builtins")
    return isinstance(value, _CONSTANTS)


def _has_constant_defaults(function: FunctionType) -> bool:
    """Return whether the default values of a function's arguments cannot change."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return all(map(_is_immutable, defaults))


def _is_torchs(value: type) -> bool:
    return _package({"__name__": value.__module__}) == "torch"


@functools.cache
def _torch_functions() -> frozenset[Any]:
    """Return the functions of torch that a stand-in among their arguments makes a trace record."""
    overridable = torch.overrides.get_overridable_functions().values()
    in_place = (torch.relu_, functional.leaky_relu_, functional.elu_, functional.hardtanh_)
    plain = (functional.sigmoid, functional.tanh, torch.jit.is_scripting)  # pyright: ignore[reportPrivateImportUsage] -- torch's own models call it so
    return frozenset(itertools.chain(*overridable, in_place, plain))


@dataclass(frozen=True)
class Member:
    """What a class has under a name: a method or property, which a module may get another one of.

    Attributes:
        value: as the class holds it.
    """

    value: Any

    def is_of(self, module: nn.Module, name: str) -> bool:
        """Return whether a module still has it under this name."""
        return name not in vars(module) and member(type(module), name) is self.value


def member(kind: type, name: str) -> Any:
    """Return what a class, as it was before `fuse`, has under a name, or None."""
    kind = vars(kind).get("class_before_fuse", kind)
    return next((vars(each)[name] for each in kind.__mro__ if name in vars(each)), None)


def attributes(module: nn.Module, names: frozenset[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the path, name and value of each attribute of a module, or of one in it, so named.

    The value of a method or property is a `Member`.

    Raises:
        KeptError: such a value can change without being another object.
    """
    for path, each in module.named_modules():
        for name in names:
            value = _attribute(each, name)
            if value is _ABSENT:
                continue
            if not _is_immutable(value):
                where = f"{path}.{name}" if path else name
                raise KeptError(f"its model's forward may read {where!r}, which may change")
            yield path, name, value


_ABSENT = object()


def _attribute(module: nn.Module, name: str) -> Any:
    """Return an attribute that is no module, or None for an absent tensor."""
    for tensors in (module._parameters, module._buffers):  # pyright: ignore[reportPrivateUsage] -- nothing public tells of absent tensors
        if name in tensors:
            return _ABSENT if tensors[name] is not None else None
    if name in vars(module):
        return vars(module)[name]
    if name in module._modules:  # pyright: ignore[reportPrivateUsage] -- as above
        return _ABSENT
    value = inspect.getattr_static(type(module), name, _ABSENT)
    methods = (FunctionType, property, staticmethod, classmethod)
    return Member(member(type(module), name)) if isinstance(value, methods) else value


def _is_immutable(value: Any) -> bool:
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_immutable, value))
    if isinstance(value, Member):
        function = getattr(value.value, "__func__", getattr(value.value, "fget", value.value))
        library = not isinstance(function, FunctionType) or _is_library(function.__globals__)
        return library or is_constant(function)
    plain = (type(None), bool, int, float, complex, str, bytes, torch.device)
    return isinstance(value, plain) or is_constant(value)
