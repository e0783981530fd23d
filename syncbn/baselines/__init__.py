"""What was done about activations' statistics before batch normalization, over all replicas."""

from syncbn.baselines.penalty import StatisticsPenalty
from syncbn.baselines.renormalize import Renormalization, Renormalizer, Unit

__all__ = ["Renormalization", "Renormalizer", "StatisticsPenalty", "Unit"]
