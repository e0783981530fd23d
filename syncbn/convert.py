"""Turning a model's batch normalization into `SyncBatchNorm`."""

import torch.distributed as dist
from torch import nn

from syncbn.errors import ConversionError
from syncbn.layers import SyncBatchNorm

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def convert_sync_batchnorm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Replace every BatchNorm1d, 2d, 3d and `torch.nn.SyncBatchNorm` by a `SyncBatchNorm`.

    The new layers hold the very parameters and buffers of the old ones, so that an optimizer made
    before stays valid; a layer used in two places stays one layer. Does not communicate.

    Args:
        module: the model; its children are replaced in place.
        process_group: the replicas to synchronise with; None means the default group.

    Returns:
        The module, or its replacement if it is a batch normalization itself.

    Raises:
        ConversionError: a layer is a subclass of batch normalization with behaviour of its own,
            which replacing it would drop, or is lazy and has no parameters yet. Nothing has been
            changed then.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and not (  # pyright: ignore[reportPrivateUsage] -- the public subclasses have no other common base
            type(child) in _CONVERTED or isinstance(child, SyncBatchNorm)
        ):
            raise ConversionError(
                f"cannot convert {name!r}: {type(child).__name__} is not one of "
                f"{', '.join(cls.__name__ for cls in _CONVERTED)}, and replacing it would drop "
                "what it does beyond them; replace it yourself, or, if lazy, pass a batch first"
            )
    return _convert(module, process_group, {})


def _convert(
    module: nn.Module, process_group: dist.ProcessGroup | None, done: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in done:
        return done[id(module)]
    done[id(module)] = module
    if type(module) in _CONVERTED:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage] -- as above
        done[id(module)] = _replacement(module, process_group)
    else:
        for name, child in list(module._modules.items()):  # pyright: ignore[reportPrivateUsage] -- named_children() skips the second place of a shared module
            if child is not None:
                setattr(module, name, _convert(child, process_group, done))
    return done[id(module)]


def _replacement(
    old: nn.modules.batchnorm._BatchNorm,  # pyright: ignore[reportPrivateUsage] -- as above
    process_group: dist.ProcessGroup | None,
) -> SyncBatchNorm:
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    # All state at once: parameters, buffers, hooks, mode, and whatever a user attached.
    new.__dict__.update(old.__dict__)
    new.process_group = process_group
    return new
