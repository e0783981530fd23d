"""What every test relies on."""

import tests.support.world  # noqa: F401 -- makes fresh allocations NaN in this process too
