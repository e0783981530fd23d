"""Whether Python calls the library as syncbn.h declares it: both are read, and compared."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from syncbn import _native

HEADER = Path(_native.__file__).with_name("syncbn.h")
# Without comments, which may hold anything.
TEXT = re.sub(r"//.*", "", HEADER.read_text())
STRUCTS: dict[str, type[ctypes.Structure]] = {
    "syncbn_layout": _native.Layout,
    "syncbn_normalization": _native.Normalization,
    "syncbn_channel": _native.Channel,
}
VALUES: dict[str, Any] = {
    "void": None,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
}


def _ctype(declared: str) -> Any:
    """Return what stands in Python for a type of C."""
    kind = declared.replace("const", "").replace(" ", "")
    if not kind.endswith("*"):
        return VALUES[kind]
    pointed = STRUCTS.get(kind[:-1])
    return ctypes.c_void_p if pointed is None else ctypes.POINTER(pointed)


def _declared_fields(struct: str) -> list[tuple[str, Any]]:
    found = re.search(rf"typedef struct {struct} {{(.*?)}} {struct};", TEXT, re.DOTALL)
    assert found is not None
    fields: list[tuple[str, Any]] = []
    for line in found[1].split(";")[:-1]:
        kind, names = re.fullmatch(r"\s*((?:const )?\w+\*?) (\w+(?:, \w+)*)", line).groups()  # pyright: ignore[reportOptionalMemberAccess] -- a line that is read in no other way fails here
        fields += [(name, _ctype(kind)) for name in names.split(", ")]
    return fields


def _declared_functions() -> dict[str, tuple[Any, list[Any]]]:
    functions: dict[str, tuple[Any, list[Any]]] = {}
    for result, name, inside in re.findall(r"^SYNCBN_EXPORT (.+?) (\w+)\(([^)]*)\);", TEXT, re.M):
        arguments = [] if inside == "void" else re.split(r",\s*", inside)
        functions[name] = _ctype(result), [_ctype(each.rsplit(" ", 1)[0]) for each in arguments]
    return functions


def test_interface_has_the_number_of_the_header_and_of_the_library() -> None:
    assert re.findall(r"#define SYNCBN_INTERFACE (\d+)", TEXT) == [str(_native.INTERFACE)]
    assert _native.library is not None
    assert _native.library.syncbn_interface() == _native.INTERFACE


def test_functions_take_and_return_what_the_header_declares() -> None:
    functions = _declared_functions()
    assert len(functions) == TEXT.count("SYNCBN_EXPORT ") - 1  # the macro's own definition
    assert functions == _native.FUNCTIONS


def test_structures_have_the_fields_of_the_header() -> None:
    assert sorted(re.findall(r"typedef struct (\w+)", TEXT)) == sorted(STRUCTS)
    for name, structure in STRUCTS.items():
        assert _declared_fields(name) == list(structure._fields_)


def test_structures_lie_in_memory_as_the_compiler_lays_them_out(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    layouts = {
        name: [ctypes.sizeof(kind), *(getattr(kind, field[0]).offset for field in kind._fields_)]
        for name, kind in STRUCTS.items()
    }
    lines = [
        f"static_assert(sizeof({name}) == {size});\n"
        + "".join(
            f"static_assert(offsetof({name}, {field[0]}) == {offset});\n"
            for field, offset in zip(STRUCTS[name]._fields_, offsets, strict=True)
        )
        for name, (size, *offsets) in layouts.items()
    ]
    source = tmp_path / "layout.cpp"
    source.write_text(f'#include <stddef.h>\n#include "{HEADER}"\n' + "".join(lines))
    subprocess.run([compiler, "-std=c++17", "-fsyntax-only", source], check=True)
