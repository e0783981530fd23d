"""Which models are loaded, by name."""

from collections.abc import Mapping
from pathlib import Path

from service.errors import ModelNotFoundError
from syncbn.bundle import Bundle, is_bundle, read_bundle
from syncbn.errors import BundleError


class Registry:
    """The loaded bundles, each under the name that its manifest states."""

    def __init__(self, bundles: Mapping[str, Bundle]) -> None:
        self._bundles = dict(sorted(bundles.items()))

    def names(self) -> list[str]:
        """Return the names of all models, sorted."""
        return list(self._bundles)

    def get(self, name: str) -> Bundle:
        """Return a model by its name.

        Raises:
            ModelNotFoundError: there is none of that name.
        """
        if name not in self._bundles:
            raise ModelNotFoundError(
                f"no model {name!r}; loaded: {', '.join(self._bundles) or 'none'}"
            )
        return self._bundles[name]


def load_registry(directory: Path, *, allow_imports: bool = False) -> Registry:
    """Load a bundle, or all bundles directly below a directory.

    Args:
        directory: the bundle, or what holds them.
        allow_imports: whether to run the code that a bundle's architecture names, as for
            `syncbn.bundle.read_bundle`.

    Raises:
        BundleError: the directory is neither, one of its bundles is not valid, or two of them
            have the same name.
    """
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory; name a bundle or a directory of them")
    # Hidden directories are bundles being written, or a mount's own affairs.
    visible = (child for child in directory.iterdir() if not child.name.startswith("."))
    children = [directory] if is_bundle(directory) else sorted(visible)
    bundles: dict[str, Bundle] = {}
    for child in filter(is_bundle, children):
        bundle = read_bundle(child, allow_imports=allow_imports)
        name = bundle.manifest.name
        if name in bundles:
            raise BundleError(f"two bundles in {directory} are called {name!r}; remove one")
        bundles[name] = bundle
    if not bundles:
        raise BundleError(f"{directory} holds no bundle; train a model, or name another directory")
    return Registry(bundles)
