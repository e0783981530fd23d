"""What tests of tasks share."""

from collections.abc import Generator

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module")
def world_of_one(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """A process group of this process alone."""
    rendezvous = tmp_path_factory.mktemp("world") / "rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
