"""What every test relies on."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def fresh_allocations_are_nan() -> None:
    """Have this process fill them as the ranks do; here, as who only hands out tests needs none."""
    import tests.support.world  # noqa: F401 # pyright: ignore[reportUnusedImport] -- sets it
