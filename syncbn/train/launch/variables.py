"""Which environment variables hold secrets, by their names."""

import re

_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether a variable of this name holds a secret, most likely."""
    return _SECRET.search(name) is not None
