"""`syncbn.environment`: a variable is what os.environ says at this moment."""

import os

import pytest

from syncbn import environment


@pytest.mark.parametrize("replaced", [False, True])
def test_variable_is_what_the_environment_says_now(
    monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    if replaced:  # by something that keeps no encoded names
        monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in (environment.KERNELS, environment.REDUCER, environment.DEBUG):
        monkeypatch.delenv(name, raising=False)
        assert environment.variable(name) is None
        monkeypatch.setenv(name, "60")
        assert environment.variable(name) == "60"
        monkeypatch.delenv(name)
        assert environment.variable(name) is None
