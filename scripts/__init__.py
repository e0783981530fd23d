"""Programs of a checkout: they call the packages and print. None of them is in the wheel."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
