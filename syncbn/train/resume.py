"""Going on where the newest checkpoint was taken, with the same number of ranks or another."""

import logging
from typing import Any

from syncbn.errors import TrainingError
from syncbn.train.agreement import from_rank_0, together
from syncbn.train.generators import restore_generators, seed_generators
from syncbn.train.plan import Plan
from syncbn.train.run.checkpoint import Checkpoint, name_best, read_newest
from syncbn.train.run.directory import RunDirectory
from syncbn.train.run.reasons import DATA
from syncbn.train.schema import Shares
from syncbn.train.setup import Training
from syncbn.train.state import State
from syncbn.train.weights import load_weights, share_state

log = logging.getLogger(__name__)


def resume(
    run: RunDirectory | None, training: Training, plan: Plan, data_sha256: str, rank: int
) -> State:
    """Return where the newest checkpoint was taken, and take what is trained there.

    Collective: the checkpoint is broadcast from rank 0.

    Args:
        run: where rank 0 reads; None on the other ranks.
        training: goes back to the checkpoint's state.
        plan: the steps of the run; those that are left are counted anew.
        data_sha256: of the data that this rank has.
        rank: this rank.

    Returns:
        The beginning, if there is no checkpoint.

    Raises:
        TrainingError: all checkpoints are damaged, the data are others, or the run cannot go on
            with this number of ranks; on every rank.
    """
    checkpoint = from_rank_0(together(lambda: None if run is None else _read(run)))
    if checkpoint is None:
        _begin(training, rank)
        if run is not None:
            run.forget_after(0, epochs=0)
        return State()
    if checkpoint.data_sha256 not in ("", data_sha256):
        raise TrainingError(
            "the data are others than those that this run began with: files, labels or samples "
            "have changed; put them back, or start a new run with another run_dir"
        ).because(DATA)
    state = State.of(checkpoint)
    position, training_config = state.position, training.config
    _restore(checkpoint, training, plan, state, rank)
    log.info("resuming in epoch %d after step %d", position.epoch + 1, position.step)
    if plan.total_steps < position.step:
        raise TrainingError(
            f"the run has made {position.step} steps, and epochs={training_config.epochs} with "
            f"max_steps={training_config.max_steps} are {plan.total_steps}; give more"
        )
    if run is not None:
        run.forget_after(position.step, position.epoch)
    return state


def _begin(training: Training, rank: int) -> None:
    """Load the starting weights on rank 0, if some are configured, and give them to all ranks."""
    config = training.config.model
    if config.weights is not None:
        together(lambda: load_weights(training.model, config) if rank == 0 else None)
        share_state(training.model)


def _read(run: RunDirectory) -> Checkpoint | None:
    checkpoint = read_newest(run.checkpoints_dir)
    if checkpoint is not None and checkpoint.is_best:
        name_best(run.checkpoints_dir, checkpoint.position)
    return checkpoint


def _restore(
    checkpoint: Checkpoint, training: Training, plan: Plan, state: State, rank: int
) -> None:
    position, config = state.position, training.config
    here, there = plan.world_size, checkpoint.world_size
    if here != there and config.data.shares is Shares.by_class and position.samples:
        raise TrainingError(
            f"the run stopped within an epoch that {there} ranks share by class, and {here} would "
            f"share otherwise; go on with {there} ranks"
        )
    plan.go_on_at(position)
    training.restore(checkpoint)
    training.schedule.resume_at(
        step=training.schedule.steps,
        total_steps=plan.total_steps,
        steps_per_epoch=plan.steps_per_epoch,
        epoch=plan.epochs_done(position),
    )
    seed_generators(config.seed, position)  # for those of which the checkpoint has none
    if here == there:
        _restore_generators(checkpoint.generators[rank], training)
    else:
        log.warning(
            "%d ranks go on with what %d have trained: each epoch still sees every sample once, "
            "and the learning rate is the one for this share of the run, but batches have another "
            "size, random numbers within the model are others, and sums round otherwise",
            here,
            there,
        )


def _restore_generators(states: dict[str, Any], training: Training) -> None:
    """Return to a checkpoint's generators, and say if it has none for this device."""
    device = training.device
    restore_generators(states, device)
    was_on_gpu = "cuda" in states
    if was_on_gpu != (device.type == "cuda"):
        log.warning(
            "the run goes on on %s, and was on %s: random numbers within the model are others, "
            "and sums round otherwise",
            device.type,
            "cuda" if was_on_gpu else "cpu",
        )
