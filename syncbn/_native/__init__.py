"""Loads the C++ library of this directory, which `build.py` compiles and syncbn.h declares."""

import ctypes
import logging
from pathlib import Path
from typing import Any

LIBRARY = Path(__file__).parent / "libsyncbn.so"
INTERFACE = 4  # SYNCBN_INTERFACE of syncbn.h

_POINTER, _FLAG, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_ROUND = ctypes.c_uint32


class Layout(ctypes.Structure):
    """A tensor's extent and how it lies in memory; `syncbn_layout` of syncbn.h."""

    _fields_ = (
        *(("n", _SIZE), ("c", _SIZE), ("s", _SIZE)),
        *(("dtype", _FLAG), ("channels_last", _FLAG), ("threads", _FLAG)),
    )


class Normalization(ctypes.Structure):
    """Pointers to what normalizes a tensor; `syncbn_normalization` of syncbn.h.

    Attributes:
        owners: of the memory that is pointed to, to be kept alive.
    """

    owners: object = None
    _fields_ = (
        *(("statistics", _POINTER), ("weight", _POINTER), ("bias", _POINTER)),
        *(("parameters_in_float64", _FLAG), ("relu", _FLAG)),
    )


class Channel(ctypes.Structure):
    """Memory that ranks share, and which of them this is; `syncbn_channel` of syncbn.h."""

    _fields_ = (("base", _POINTER), ("capacity", _SIZE), ("world", _FLAG), ("rank", _FLAG))


_LAYOUT, _NORMALIZATION = ctypes.POINTER(Layout), ctypes.POINTER(Normalization)
_CHANNEL = ctypes.POINTER(Channel)
# Each function's result and arguments, as in syncbn.h; a test compares the two.
FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "syncbn_interface": (_FLAG, []),
    "syncbn_limit_level": (_FLAG, [_FLAG]),
    "syncbn_local_moments": (None, [_LAYOUT, _POINTER, _POINTER]),
    "syncbn_pack_moments": (None, [_POINTER, _SIZE, _POINTER, _POINTER]),
    "syncbn_unpack_moments": (None, [_POINTER, _SIZE, _POINTER, _POINTER]),
    "syncbn_move_shift": (None, [_POINTER, _SIZE, _FLAG, _POINTER]),
    "syncbn_add_fingerprint": (None, [_POINTER, _SIZE, _FLAG, _FLAG, _POINTER]),
    "syncbn_statistics": (None, [_POINTER, _SIZE, _REAL, _POINTER]),
    "syncbn_update_running": (None, [_POINTER, _SIZE, _REAL, _POINTER, _POINTER, _POINTER]),
    "syncbn_normalize": (None, [_LAYOUT, _POINTER, _POINTER, _NORMALIZATION, _POINTER]),
    "syncbn_backward_reduce": (
        *(None, [_LAYOUT, _POINTER, _POINTER, _NORMALIZATION, _POINTER, _POINTER, _POINTER]),
    ),
    "syncbn_backward_input": (
        *(None, [_LAYOUT, _POINTER, _POINTER, _NORMALIZATION, _POINTER, _POINTER]),
    ),
    "syncbn_channel_size": (_SIZE, [_FLAG, _SIZE]),
    "syncbn_channel_sum": (
        *(_FLAG, [_CHANNEL, _ROUND, _POINTER, _POINTER, _SIZE, _SIZE, _FLAG, _SIZE]),
    ),
    "syncbn_channel_collect": (*(_FLAG, [_CHANNEL, _ROUND, _POINTER, _SIZE, _SIZE, _FLAG, _SIZE]),),
    "syncbn_channel_give_up": (None, [_CHANNEL]),
    "syncbn_channel_gave_up": (_FLAG, [_CHANNEL, _FLAG]),
}


def _load() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(LIBRARY))
        interface = found.syncbn_interface()
    except (OSError, AttributeError) as error:
        reason = str(error) if LIBRARY.exists() else "they were not compiled with this installation"
    else:
        if interface == INTERFACE:
            for name, (result, arguments) in FUNCTIONS.items():
                function = getattr(found, name)
                function.argtypes = arguments
                function.restype = result
            return found
        reason = f"they have interface {interface}, and this version of syncbn wants {INTERFACE}"
    logging.getLogger("syncbn").warning(
        "no native kernels (%s): batch normalization on the CPU computes with PyTorch operations, "
        "the same results at a lower speed; to compile them, install g++ or clang++ and then "
        "syncbn again",
        reason,
    )
    return None


# Loaded once, on import, and not on first use: torch.compile must find nothing to do here.
# None, with the line in the log, if there is no library that fits.
library = _load()
