"""What an administrator may have set up, for all tests of submissions."""

from pathlib import Path

import pytest

from syncbn.jobs.offer.catalog import Catalog
from syncbn.jobs.offer.settings import JobSettings

SETTINGS = """
[data.flowers]
kind = "folder"
path = "images/flowers"
help = "17 kinds of flowers"
size = 64

[data.streets]
kind = "cityscapes"
path = "/srv/cityscapes"
height = 128
width = 256

[data.ours]
kind = "custom"
factory = "our.data:load"
arguments = { split = 3 }

[models.large]
kind = "timm"
architecture = "resnet50"
help = "the usual one"
arguments = { drop_rate = 0.1 }

[models.pretrained]
kind = "torchvision"
architecture = "resnet18"
weights = "weights/resnet18.safetensors"
weights_strict = false

[defaults.choices]
norm = "local"

[defaults.values]
launch.timeout_s = 600
optim.lr = 0.02
epochs = 3
"""


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    """Without settings."""
    return Catalog()


@pytest.fixture(scope="session")
def administered(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    """With data sets, models and defaults of an administrator."""
    directory: Path = tmp_path_factory.mktemp("jobs")
    (directory / "settings.toml").write_text(SETTINGS)
    return Catalog(JobSettings.read(directory))
