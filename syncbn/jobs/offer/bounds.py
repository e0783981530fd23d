"""The largest numbers that a submission may ask for: no number of a job is without a bound."""

from collections.abc import Mapping

from syncbn.jobs.offer.settings import Limits


def largest(limits: Limits) -> Mapping[str, float]:
    """Return the largest value of every number that may be set and has no bound in its schema.

    Those of one choice alone are named by group, choice and key. Memory is bounded apart, as no
    number decides it alone.
    """
    steps = 10**9  # years of them
    return {
        "seed": 2**53 - 1,  # as far as a browser counts exactly
        "epochs": limits.epochs,
        "patience": limits.epochs,
        "max_steps": steps,
        "log_every_steps": steps,
        "numerics.max_skipped_steps": steps,
        "checkpoint.every_steps": steps,
        "checkpoint.keep": 10,  # each has the weights and the state of the optimizer
        "launch.nproc": limits.nproc,
        "task.class_weights": 1e6,
        "task.dice": 1e3,
        "task.auxiliary": 1e3,
        "data.batch_size": 65_536,
        "data.workers": limits.loaders,
        "data.crop_padding": 64,  # twice the largest image that is padded
        "data.size": 2048,
        "data.height": 2048,
        "data.width": 2048,
        "data.channels": 1024,
        "data.classes": 10_000,
        "data.synthetic.samples": 10**8,
        "data.synthetic.test_samples": 10**8,
        # A scene is drawn in a millisecond: a few minutes of them.
        "data.digit_scenes.samples": 200_000,
        "data.digit_scenes.test_samples": 200_000,
        "model.size": 256,
        "model.width": 8192,
        "model.mlp.depth": 1024,
        "model.unet.depth": 8,  # halves 256 pixels to one
        "norm.eps": 1,
        "norm.strength": 1e6,
        "norm.group_size": 512,  # the time of a step grows with its square and more
        "norm.iterations": 100,
        "optim.lr": 100,
        "optim.momentum": 1,
        "optim.weight_decay": 10,
        "optim.accumulate": 65_536,
        "optim.clip_norm": 1e6,
        "schedule.warmup_steps": steps,
        "schedule.every_epochs": limits.epochs,
    }
