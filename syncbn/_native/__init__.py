"""Loads the C++ library of this directory, which `build.py` compiles."""

import ctypes
import logging
from pathlib import Path

LIBRARY = Path(__file__).parent / "libsyncbn.so"
INTERFACE = 3  # syncbn_interface() of exports.cpp

_POINTER, _FLAG, _SIZE, _REAL = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_double
_LAYOUT = [_SIZE, _SIZE, _SIZE, _FLAG]  # n, c, s, channels_last
_PARAMETERS = [_POINTER, _POINTER, _FLAG, _FLAG]  # weight, bias, in_float64, relu
_STATISTICS = [_POINTER, _POINTER]  # mean, invstd
_CHANNEL = [_POINTER, _FLAG, _SIZE, _FLAG]  # base, world, capacity, rank
_FUNCTIONS = {
    "syncbn_limit_level": [_FLAG],
    "syncbn_local_moments": [_FLAG, _POINTER, *_LAYOUT, _FLAG, *_STATISTICS],
    "syncbn_summable_moments": [
        *(_FLAG, _POINTER, *_LAYOUT, _FLAG, _POINTER, _FLAG, _FLAG, _POINTER),
    ],
    "syncbn_global_moments": [_POINTER, _FLAG, _POINTER, _SIZE, _REAL, _POINTER],
    "syncbn_track": [_POINTER, _SIZE, _REAL, *[_POINTER] * 3],
    "syncbn_normalize": [_FLAG, *[_POINTER] * 3, *_LAYOUT, _FLAG, *_STATISTICS, *_PARAMETERS],
    "syncbn_backward_reduce": [
        *(_FLAG, _POINTER, _POINTER, *_LAYOUT, _FLAG, *_STATISTICS, *_PARAMETERS),
        *[_POINTER] * 4,
    ],
    "syncbn_backward_input": [
        *(_FLAG, *[_POINTER] * 3, *_LAYOUT, _FLAG, *_STATISTICS, *_PARAMETERS),
        *(_POINTER, _POINTER, _REAL),
    ],
    "syncbn_channel_size": [_FLAG, _SIZE],
    "syncbn_channel_sum": [
        *(*_CHANNEL, ctypes.c_uint32, _POINTER, _POINTER, _SIZE, _SIZE, _FLAG, _SIZE),
    ],
    "syncbn_channel_collect": [
        *(*_CHANNEL, ctypes.c_uint32, _POINTER, _SIZE, _SIZE, _FLAG, _SIZE),
    ],
    "syncbn_channel_give_up": _CHANNEL,
    "syncbn_channel_gave_up": _CHANNEL,
}
_RESULTS = {
    "syncbn_limit_level": _FLAG,
    "syncbn_summable_moments": ctypes.c_uint64,
    "syncbn_global_moments": _REAL,
    "syncbn_channel_size": _SIZE,
    "syncbn_channel_sum": _FLAG,
    "syncbn_channel_collect": _FLAG,
    "syncbn_channel_gave_up": _FLAG,
}


def _load() -> ctypes.CDLL | None:
    try:
        found = ctypes.CDLL(str(LIBRARY))
        interface = found.syncbn_interface()
    except (OSError, AttributeError) as error:
        reason = str(error) if LIBRARY.exists() else "they were not compiled with this installation"
    else:
        if interface == INTERFACE:
            for name, arguments in _FUNCTIONS.items():
                function = getattr(found, name)
                function.argtypes = arguments
                function.restype = _RESULTS.get(name)
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
# None, with the line in the log, where there is no library that fits.
library = _load()
