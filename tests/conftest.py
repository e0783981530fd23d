"""What every test relies on."""

import tests.support.world  # noqa: F401 # pyright: ignore[reportUnusedImport] -- makes fresh allocations NaN in this process too
