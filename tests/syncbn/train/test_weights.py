import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from syncbn.bundle import read_bundle
from syncbn.errors import ConfigError
from syncbn.train.run.checkpoint import checkpoint_files, read_checkpoint
from syncbn.train.schema import CnnConfig
from syncbn.train.weights import load_weights
from tests.support.jobs import Job, wait_until


def _model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(1, 2)
    return model


def _load(file: Path, model: nn.Module, *, strict: bool = True) -> None:
    load_weights(model, CnnConfig(width=4, weights=str(file), weights_strict=strict))


def _saved(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


WRAPPED: dict[str, Any] = {
    "a state dict": lambda state: state,
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "under model": lambda state: {"model": state, "args": {"lr": 0.5}},
    "of DDP": lambda state: {f"module.{key}": value for key, value in state.items()},
    "of DDP and compile": lambda state: {
        "state_dict": {f"module._orig_mod.{key}": value for key, value in state.items()}
    },
    "in half precision": lambda state: {
        key: value.half() if value.is_floating_point() else value for key, value in state.items()
    },
    "of an old torch": lambda state: {
        key: value for key, value in state.items() if not key.endswith("num_batches_tracked")
    },
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_taken_from_torchs_file(tmp_path: Path, wrap: Any) -> None:
    source, model = _model(), _model()
    _load(_saved(tmp_path / "weights.pt", wrap(source.state_dict())), model)
    tolerance = 1e-3 if wrap is WRAPPED["in half precision"] else 0
    torch.testing.assert_close(
        model.state_dict(), source.state_dict(), rtol=tolerance, atol=tolerance
    )


def test_weights_are_taken_from_safetensors(tmp_path: Path) -> None:
    source, model = _model(), _model()
    safetensors.torch.save_file(source.state_dict(), tmp_path / "model.safetensors")
    _load(tmp_path / "model.safetensors", model)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)


def _other_head() -> dict[str, Tensor]:
    state = _model().state_dict()
    del state["0.bias"]
    return state | {"2.weight": torch.ones(5, 3), "3.weight": torch.ones(1)}


def test_every_mismatch_is_named(tmp_path: Path) -> None:
    file = _saved(tmp_path / "other.pt", _other_head())
    with pytest.raises(ConfigError) as caught:
        _load(file, _model())
    assert str(caught.value) == (
        f"model.weights={file}: it lacks 0.bias; the model has no 3.weight; other shapes: 2.weight "
        "is (5, 3), not (2, 3); model.weights_strict=false takes what fits"
    )


def test_what_fits_is_taken_on_request_and_the_rest_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, model = _other_head(), _model()
    head = model.state_dict()["2.weight"].clone()
    with caplog.at_level(logging.WARNING):
        _load(_saved(tmp_path / "other.pt", state), model, strict=False)
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"])
    assert torch.equal(model.state_dict()["2.weight"], head)
    assert "it lacks 0.bias; the model has no 3.weight; other shapes: 2.weight" in caplog.text


def test_file_of_a_part_is_taken_into_that_part(tmp_path: Path) -> None:
    source, model = _model(), nn.ModuleDict({"backbone": _model(), "head": nn.Linear(2, 1)})
    file = str(_saved(tmp_path / "part.pt", source.state_dict()))
    load_weights(model, CnnConfig(width=4, weights=file, weights_into="backbone"))
    torch.testing.assert_close(model["backbone"].state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"into=bakbone: .* no such part; did you mean backbone "):
        load_weights(model, CnnConfig(width=4, weights=file, weights_into="bakbone"))


class _Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("made-by-a-file-of-weights",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, ": No such file or directory; name a local file$"),
        (_Code(), " is not a file of tensors that torch loads without running code: "),
        ({"epoch": 3, "arguments": [1]}, "holds no state dict, .* but keys epoch, arguments$"),
        ([torch.ones(1)], "holds no state dict, neither by itself nor under one of state_dict, "),
        ({"0.weight": torch.tensor([torch.nan])}, " has values that are not finite in 0.weight$"),
        (
            {"other": torch.ones(1)},
            "; nothing in it fits; a file of a part needs model",
        ),
    ],
)
def test_unusable_file_is_refused_in_any_mode(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "weights.pt"
    if content is not None:
        torch.save(content, file)
    for strict in (True, False):
        with pytest.raises(ConfigError, match=rf"^model.weights={file}.*{message}"):
            _load(file, _model(), strict=strict)
    assert not Path("made-by-a-file-of-weights").exists()


def test_damaged_safetensors_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not weights")
    with pytest.raises(ConfigError, match=r"model.safetensors is not a safetensors file: "):
        _load(file, _model())


def test_run_starts_from_the_file_and_goes_on_and_is_served_without_it(tmp_path: Path) -> None:
    first = Job(tmp_path / "first", "epochs=1", "data.batch_size=64", "launch.nproc=1")
    assert first.wait() == 0
    file = tmp_path / "moved.safetensors"
    (first.run.bundle_dir / "model.safetensors").rename(file)
    small = ["data.batch_size=64", "optim.lr=1e-30", "optim.weight_decay=0", "log_every_steps=1"]
    overrides = [*small, "epochs=3", f"model.weights={file}"]
    job = Job(tmp_path / "second", *overrides)
    lines = job.run.path / "steps.jsonl"
    wait_until(lambda: lines.exists() and len(lines.read_text().splitlines()) >= 3)
    os.kill(job.supervisor.pid, signal.SIGTERM)
    assert job.wait(20) == 128 + signal.SIGTERM
    started = read_checkpoint(checkpoint_files(job.run.checkpoints_dir)[0]).states["model"]
    source = safetensors.torch.load_file(file)
    for name, value in started.items():  # with that rate, only statistics move
        assert torch.equal(value, source[name]) == ("running" not in name and "num" not in name)
    file.unlink()
    assert Job(tmp_path / "second", *overrides).wait() == 0
    assert "moved" not in (job.run.bundle_dir / "bundle.json").read_text()
    read_bundle(job.run.bundle_dir)


def test_missing_file_ends_the_run_before_its_first_step(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", f"model.weights={tmp_path / 'none.pt'}")
    assert job.wait() == 2
    result = json.loads((job.run.path / "result.json").read_text())
    assert result["error"].endswith("none.pt: No such file or directory; name a local file")
