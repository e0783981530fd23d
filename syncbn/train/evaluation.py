"""How good a model is on the held-out data, each sample counted once whatever the world size."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from syncbn.comm.reducer import Reducer
from syncbn.train.data.sampling import Batch
from syncbn.train.schema import SYNCHRONIZED
from syncbn.train.setup import Training


def evaluate(
    training: Training,
    model: nn.Module,
    batches: Iterable[Batch],
    reducer: Reducer,
) -> dict[str, float]:
    """Return a model's mean loss (nats) and accuracy (0 to 1) over the batches of all ranks.

    Collective: one all-reduce of 3 float64, and where layers are not synchronized one broadcast a
    buffer from rank 0, whose running statistics are the ones that will be served.

    Raises:
        DataError: a sample cannot be read, on this rank alone.
    """
    if not isinstance(training.config.norm, SYNCHRONIZED):
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)
    was_training = model.training
    model.eval()
    count = 0
    # Added up where they are computed, so that no batch makes the host wait.
    sums = torch.zeros(2, dtype=torch.float64, device=training.device)
    loss, right = sums.unbind()
    with torch.inference_mode():
        for samples, labels in batches:
            with training.autocast():
                logits: Tensor = model(training.inputs(samples)).float()
            targets = labels.to(logits.device, non_blocking=True)
            loss += functional.cross_entropy(logits, targets, reduction="sum")
            right += (logits.argmax(1) == targets).sum()
            count += len(labels)
    model.train(was_training)
    mine = torch.tensor([*sums.tolist(), count], dtype=torch.float64)
    loss_sum, right_sum, total = reducer.sum(mine).tolist()
    return {"test_loss": loss_sum / total, "test_accuracy": right_sum / total}
