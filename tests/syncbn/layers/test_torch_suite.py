"""PyTorch's own tests of its SyncBatchNorm hold for ours."""

import ast

import pytest
import torch

from tests.support.torch_suite import PASSED, SOURCE, run_suite
from tests.support.world import run_world

RUN = [
    "test_DistributedDataParallel_SyncBatchNorm",
    "test_DistributedDataParallel_SyncBatchNorm_2D_Input",
    "test_DistributedDataParallel_SyncBatchNorm_Channels_Last",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_Running_Value",
    "test_DistributedDataParallel_SyncBatchNorm_Diff_Input_Sizes_gradient",
    "test_DistributedDataParallel_SyncBatchNorm_No_Affine",
    "test_DistributedDataParallel_SyncBatchNorm_Single_Input_Per_Process",
    "test_DistributedDataParallel_SyncBatchNorm_half",
    "test_SyncBatchNorm_process_group",
    "test_ddp_inference",
    "test_ddp_uneven_inputs_stop_iteration_sync_bn",
    "test_sync_bn_logged",
]
NOT_RUN = {
    "test_ddp_sync_bn_training_vs_eval": "switched off in torch, and looks for an all-gather, "
    "which ours does without",
}
WORLD_SIZES = [2, pytest.param(4, marks=pytest.mark.long)]

Outcomes = list[dict[str, str]]


@pytest.fixture(scope="module", params=WORLD_SIZES, ids="world of {}".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return run_world(request.param, run_suite, RUN, tmp_path_factory.mktemp("suite"), deadline_s=90)


@pytest.mark.parametrize("name", RUN)
def test_of_torch_passes(outcomes: Outcomes, name: str) -> None:
    for rank, of_rank in enumerate(outcomes):
        if name not in of_rank:
            pytest.skip(f"not in torch {torch.__version__}")
        assert of_rank[name] == PASSED, f"on rank {rank}"


@pytest.mark.parametrize("name", NOT_RUN)
def test_of_torch_does_not_apply(name: str) -> None:
    pytest.skip(NOT_RUN[name])


def test_every_test_of_torch_that_uses_the_layer_is_listed() -> None:
    suite = ast.parse(SOURCE.read_text())
    methods = [node for node in ast.walk(suite) if isinstance(node, ast.FunctionDef)]
    using = {
        method.name
        for method in methods
        if "SyncBatchNorm" in ast.unparse(ast.Module(method.body, []))
    }
    # What a test calls may be where the layer is used; a decorator's wrapper is nobody's test.
    tests = {
        method.name
        for method in methods
        if method.name.startswith("test_")
        and (
            method.name in using
            or any(
                isinstance(node, ast.Attribute) and node.attr in using for node in ast.walk(method)
            )
        )
    }
    assert tests
    assert tests <= {*RUN, *NOT_RUN}
