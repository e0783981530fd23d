"""What every test relies on."""

import os

import pytest

# Before torch is imported, and for the processes that tests start: tests run beside each other, and
# threads that wait for each other in turns would take a quarter of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def fresh_allocations_are_nan() -> None:
    """Have this process fill them as the ranks do; here, as who only hands out tests needs none."""
    import tests.support.world  # noqa: F401 # pyright: ignore[reportUnusedImport] -- sets it
