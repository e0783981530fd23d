"""PyTorch's own distributed tests, as the wheel ships them, run on CPU against our layer.

Nothing of the suite is copied or changed: what it takes from the GPU and from `torch.nn` is
replaced around it, in the ranks' processes alone, and its assertions stay as they are.
"""

import importlib
import inspect
import os
import unittest
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import syncbn

_MODULE = "torch.testing._internal.distributed.distributed_test"
SOURCE = Path(torch.__file__).parent.parent.joinpath(*_MODULE.split(".")).with_suffix(".py")

PASSED = ""


def run_suite(names: list[str], directory: Path) -> dict[str, str]:
    """Run tests of the suite on this rank, to be called by every rank.

    Args:
        names: the tests' names, run in this order.
        directory: empty, seen by all ranks.

    Returns:
        PASSED, or what went wrong, by name. A name that this version of torch lacks is left out.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    suite = _load_suite(rank, world_size, directory)
    outcomes: dict[str, str] = {}
    for name in filter(suite.__dict__.__contains__, names):
        # A group for each test: a rank that fails leaves it, which ends the test on the others.
        dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            init_method=(directory / name).as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=20),
        )
        dist.barrier()  # a rank that leaves before another has connected would break its start
        result = unittest.TestResult()
        with _on_cpu_with_our_layer():
            suite(name).run(result)
        outcomes[name] = "\n".join(
            text for _, text in [*result.failures, *result.errors, *result.skipped]
        )
        assert result.testsRun == 1
    return outcomes


def _load_suite(rank: int, world_size: int, directory: Path) -> Any:
    """Return the suite's tests as a test case class, without the conditions for skipping them."""
    os.environ |= {
        "BACKEND": "gloo",
        "WORLD_SIZE": str(world_size),
        "TEMP_DIR": str(directory),
        "INIT_METHOD": "file://",  # makes the suite save and reload a model amid training
    }
    module: Any = importlib.import_module(_MODULE)
    common: Any = importlib.import_module("torch.testing._internal.common_utils")
    # Stands in for the one thing that the suite takes from torchvision: a nested model.
    module.torchvision = SimpleNamespace(models=SimpleNamespace(resnet50=_nested_model))
    base = module.DistributedTest._DistTestBase
    # Behind the decorators, which ask for GPUs, are the tests as written.
    tests = {
        name: inspect.unwrap(test) for name, test in vars(base).items() if name.startswith("test_")
    }
    # The suite's own barrier polls a file ten times a second.
    namespace = {"rank": rank, "_barrier": lambda self, timeout=0: dist.barrier(), **tests}
    return type("TorchSuite", (common.TestCase, base), namespace)


def _nested_model() -> nn.Module:
    return nn.ModuleDict({"layer1": nn.Sequential(nn.ModuleDict({"bn1": nn.BatchNorm2d(4)}))})


@contextmanager
def _on_cpu_with_our_layer() -> Generator[None]:
    convert = staticmethod(syncbn.convert_sync_batchnorm)
    create: Callable[..., None] = DistributedDataParallel.__init__

    def create_on_cpu(self: Any, module: nn.Module, device_ids: Any = None, **options: Any) -> None:
        create(self, module, **options)

    with ExitStack() as stack:
        for target, name, value in (
            (nn, "SyncBatchNorm", syncbn.SyncBatchNorm),
            (syncbn.SyncBatchNorm, "convert_sync_batchnorm", convert),
            (DistributedDataParallel, "__init__", create_on_cpu),
            (torch.cuda, "set_device", lambda device: None),
            (torch.cuda, "current_device", lambda: "cpu"),
        ):
            stack.enter_context(mock.patch.object(target, name, value, create=True))
        stack.enter_context(_OnCPU())
        yield


class _OnCPU(TorchFunctionMode):
    """Takes every device that a call names for the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.cuda:
            return args[0]
        if func is torch.device:
            return torch.device("cpu")
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
