"""What is trained on one rank, and how it goes into a checkpoint and comes back."""

import dataclasses
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from syncbn.baselines import Renormalizer, StatisticsPenalty, Unit
from syncbn.bundle import Architecture, check_exportable
from syncbn.errors import BundleError, ConfigError, ModelError
from syncbn.layers.base import Synchronized, shifts
from syncbn.models import ChannelAffine, build_model, build_without_memory
from syncbn.train.average import WeightAverage
from syncbn.train.data import Dataset
from syncbn.train.description import describe
from syncbn.train.generators import seed_alike
from syncbn.train.model_checks import check_normalization
from syncbn.train.optim import make_optimizer
from syncbn.train.parameters import freeze, parameter_groups
from syncbn.train.run.checkpoint import Checkpoint
from syncbn.train.schedule import Schedule
from syncbn.train.schema import (
    CustomModelConfig,
    LocalNormConfig,
    PenaltyNormConfig,
    Precision,
    RenormalizeNormConfig,
    SyncNormConfig,
    TimmConfig,
    TorchvisionConfig,
    TrainConfig,
    UnetConfig,
    WhiteningNormConfig,
)
from syncbn.train.tasks import Task
from syncbn.transforms.convert import convert_sync_batchnorm
from syncbn.transforms.fold import layers_before

log = logging.getLogger(__name__)

_DTYPES = {Precision.bfloat16: torch.bfloat16, Precision.float16: torch.float16}


@dataclass(frozen=True)
class Training:
    """The model, its replica under DDP, and what moves them, on one rank.

    Attributes:
        task: what is learned.
        preprocess: turns raw samples on the device into the model's inputs.
        average: the moving average of the model; None where there is none.
        penalty: on the statistics of activations; None where there is none.
        renormalizer: what rescales the units after each step; None where nothing does.
        exported: what is evaluated and exported: the average, or the model.
    """

    config: TrainConfig
    task: Task
    device: torch.device
    architecture: Architecture
    model: nn.Module
    replica: DistributedDataParallel
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    preprocess: Callable[[Tensor], Tensor]
    average: WeightAverage | None
    penalty: StatisticsPenalty | None
    renormalizer: Renormalizer | None

    @property
    def exported(self) -> nn.Module:
        """The model that is evaluated and exported."""
        return self.model if self.average is None else self.average.module

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model computes."""
        dtype = _DTYPES.get(self.config.numerics.precision)
        return torch.autocast(self.device.type, dtype) if dtype is not None else nullcontext()

    def inputs(self, samples: Tensor) -> Tensor:
        """Return what the model is given for raw samples, where and how it computes."""
        inputs = self.preprocess(samples.to(self.device, non_blocking=True))
        if self.config.numerics.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def shifts(self) -> dict[str, Tensor]:
        """Return what the synchronized layers sum about, by their names; see `base.shifts`."""
        return shifts(self.model)

    def state_dicts(self) -> dict[str, Any]:
        """Return everything that training changes, by name."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        return states | {"shifts": self.shifts()}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Return to a former state."""
        for name, part in self._parts().items():
            part.load_state_dict(checkpoint.states[name])
        kept = checkpoint.states.get("shifts", {})  # an earlier version did not keep them
        for name, shift in self.shifts().items():
            if name in kept:
                shift.copy_(kept[name])

    def _parts(self) -> dict[str, Any]:
        # The optimizer before the schedule, because its state has rates too.
        parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        parts |= {"schedule": self.schedule, "scaler": self.scaler}
        return parts if self.average is None else parts | {"average": self.average}


def prepare(
    config: TrainConfig,
    task: Task,
    dataset: Dataset,
    device: torch.device,
    total_steps: int,
    steps_per_epoch: int,
) -> Training:
    """Return the configured model, ready to train on this rank.

    Collective: DDP compares and broadcasts the parameters, and one step is made on zeros and taken
    back, see `_settle`.

    Raises:
        ConfigError: the model or optimizer cannot be made as configured.
    """
    custom = isinstance(config.model, CustomModelConfig)
    try:
        architecture = describe_architecture(config, task)
        seed_alike(config.seed)  # whatever a factory of the user's draws from
        torch.manual_seed(config.seed)
        model = build_model(architecture.name, architecture.arguments, allow_imports=custom)
        # What cannot be exported at the end is known at the beginning.
        description = describe(config, task, architecture, dataset)
        check_exportable(description, model, allow_imports=custom)
    except (ModelError, ValidationError) as error:
        raise ConfigError(f"model: {error}") from error
    except BundleError as error:
        raise ConfigError(f"the model could not be exported once it is trained: {error}") from error
    check_normalization(model, architecture.name, config)
    if isinstance(config.norm, SyncNormConfig):
        model = convert_sync_batchnorm(model)
    if config.numerics.compile and isinstance(
        config.norm, PenaltyNormConfig | RenormalizeNormConfig
    ):
        raise ConfigError(
            f"norm={config.norm.name} looks at activations while the model runs, which "
            "numerics.compile=true hides; choose numerics.compile=false"
        )
    freeze(model, config.optim.freeze)
    model.to(device)
    if config.numerics.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] -- torch documents it, its stub lacks it
    decay = config.optim.ema_decay
    average = None if decay is None else WeightAverage(model, decay, config.optim.ema_warmup)
    if config.numerics.compile:
        model.compile()
    with warnings.catch_warnings():
        # The successor of `broadcast_buffers` is not in torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
        replica = DistributedDataParallel(
            model,
            broadcast_buffers=bool(buffers_of_ranks(model)),
            find_unused_parameters=config.launch.find_unused_parameters,
        )
    # Of layers with one channel, whose strides are the same in either format.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    optimizer = make_optimizer(parameter_groups(model, config.optim), config.optim)
    plan = config.epochs, config.max_steps
    schedule = Schedule(optimizer, config.schedule, total_steps, steps_per_epoch, plan)
    scaler = torch.amp.GradScaler(
        device.type, enabled=config.numerics.precision is Precision.float16
    )
    penalty = renormalizer = None
    if isinstance(config.norm, PenaltyNormConfig):
        penalty = StatisticsPenalty(_affines(model), config.norm.strength)
    elif isinstance(config.norm, RenormalizeNormConfig):
        units = _units(model, architecture, allow_imports=custom)
        renormalizer = Renormalizer(units, config.norm.eps)
    return Training(
        config,
        task,
        device,
        architecture,
        model,
        replica,
        optimizer,
        schedule,
        scaler,
        dataset.preprocessing.prepared(1 + len(dataset.input.shape), device),
        average,
        penalty,
        renormalizer,
    )


def describe_architecture(config: TrainConfig, task: Task) -> Architecture:
    """Return the name and the arguments with which `build_model` makes the configured model."""
    arguments: dict[str, Any]
    match config.model:
        case TorchvisionConfig() | TimmConfig():
            name = f"{config.model.name}.{config.model.architecture}"
            arguments = dict(config.model.arguments)
        case UnetConfig():
            name = "unet" if config.model.encoder is None else f"unet.{config.model.encoder}"
            arguments = {"width": config.model.width, "depth": config.model.depth}
        case CustomModelConfig():
            name, arguments = config.model.factory, dict(config.model.arguments)
        case _:
            arguments = dataclasses.asdict(config.model)
            name = arguments.pop("name")
            # A bundle has weights of its own, and must not depend on where these came from.
            for key in ("weights", "weights_into", "weights_strict"):
                del arguments[key]
    arguments |= task.model_arguments()
    if isinstance(config.norm, LocalNormConfig):  # synchronized too; serving needs no more
        options: dict[str, Any] = {"norm": "batch"}
        options |= {"eps": config.norm.eps, "momentum": config.norm.momentum}
    elif isinstance(config.norm, WhiteningNormConfig):
        given = dataclasses.asdict(config.norm) | {"method": config.norm.method.value}
        options = {"norm": given.pop("name")}
        options |= {key: given.pop(key) for key in ("eps", "momentum")}
        options |= {f"whitening_{key}": value for key, value in given.items()}
    else:  # a penalty, or renormalizing, leaves nothing for serving to do
        options = {"norm": "none"}
    arguments |= {key: value for key, value in options.items() if value is not None}
    return Architecture(name=name, arguments=arguments)


def _affines(model: nn.Module) -> dict[str, nn.Module]:
    """Return what stands in the places of batch normalization."""
    return {name: each for name, each in model.named_modules() if isinstance(each, ChannelAffine)}


def _units(model: nn.Module, architecture: Architecture, *, allow_imports: bool) -> dict[str, Unit]:
    """Return the units of a model without batch normalization, where it would normalize them."""
    arguments = {**architecture.arguments, "norm": "batch"}
    twin = build_without_memory(architecture.name, arguments, allow_imports=allow_imports)
    before, kept = layers_before(twin)
    units: dict[str, Unit] = {}
    for name, affine in _affines(model).items():
        layer = model.get_submodule(before[name]) if name in before else None
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            reason = kept.get(name, f"its weights are those of a {type(layer).__name__}")
            raise ConfigError(f"norm=renormalize cannot rescale what {name!r} follows: {reason}")
        if layer.bias is not None or not isinstance(affine.bias, nn.Parameter):
            raise ConfigError(
                f"norm=renormalize needs {before[name]!r} without a bias and {name!r} with one"
            )
        if not (layer.weight.requires_grad and affine.bias.requires_grad):
            raise ConfigError(
                f"norm=renormalize rescales {before[name]!r}, which optim.freeze keeps from "
                "changing; choose other patterns or another norm"
            )
        units[name] = Unit(layer.weight, affine.bias, affine)
    return units


def buffers_of_ranks(model: nn.Module) -> list[Tensor]:
    """Return the buffers that each rank has for itself: those of no synchronized layer."""
    synchronized = {
        id(buffer)
        for module in model.modules()
        if isinstance(module, Synchronized)
        for buffer in module.buffers(recurse=False)
    }
    return [buffer for buffer in model.buffers() if id(buffer) not in synchronized]
