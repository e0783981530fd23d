"""Models by name, with a normalization that can be chosen."""

from syncbn.models.arguments import Norm
from syncbn.models.build import ARCHITECTURES, build_model, build_without_memory, model_names
from syncbn.models.normalization import ChannelAffine
from syncbn.models.ours import cnn, mlp
from syncbn.models.torchvision import Segmenter
from syncbn.models.unet import unet

__all__ = [
    "ARCHITECTURES",
    "ChannelAffine",
    "Norm",
    "Segmenter",
    "build_model",
    "build_without_memory",
    "cnn",
    "mlp",
    "model_names",
    "unet",
]
