import pickle

import pytest

from syncbn import errors

ERRORS = [
    error
    for error in vars(errors).values()
    if isinstance(error, type) and issubclass(error, errors.SyncBNError)
]


@pytest.mark.parametrize("error", ERRORS)
def test_errors_survive_pickling_between_processes(error: type[errors.SyncBNError]) -> None:
    copy = pickle.loads(pickle.dumps(error("what was wrong")))
    assert type(copy) is error
    assert str(copy) == "what was wrong"
