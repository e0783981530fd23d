"""`syncbn.environment`: a variable is what os.environ says at this moment."""

import pytest

from syncbn import environment


@pytest.mark.parametrize("encoded", [True, False])
def test_variable_is_what_the_environment_says_now(
    monkeypatch: pytest.MonkeyPatch, encoded: bool
) -> None:
    if not encoded:  # a Python, or a system, whose os.environ keeps no encoded names
        monkeypatch.setattr(environment, "_variables", None)
    for name in (environment.KERNELS, environment.REDUCER, environment.DEBUG):
        monkeypatch.delenv(name, raising=False)
        assert environment.variable(name) is None
        monkeypatch.setenv(name, "60")
        assert environment.variable(name) == "60"
        monkeypatch.delenv(name)
        assert environment.variable(name) is None
