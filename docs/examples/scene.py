"""Write the first test image of data=digit_scenes to a PNG file, which the command names."""

import sys

from PIL import Image

from syncbn.train.config import compose_config
from syncbn.train.data.datasets import load_dataset

dataset = load_dataset(compose_config(["data=digit_scenes"]).data, seed=0)
assert dataset.test is not None
samples, _ = dataset.test.__getitems__([(0, 0)])
Image.fromarray(samples[0].permute(1, 2, 0).numpy()).save(sys.argv[1])
