"""What is served is what was trained: from training on two ranks to an answer over HTTP."""

import time
from pathlib import Path

import torch
import torch.distributed as dist
from fastapi.testclient import TestClient
from torch import Tensor, nn

from service.app import create_app
from service.settings import Settings
from syncbn.train import loop, setup
from syncbn.train.config import compose_config
from syncbn.train.data.datasets import digits, load_dataset
from syncbn.train.data.images import TensorImages
from syncbn.train.run.directory import open_run_directory
from tests.support.jobs import quiet_watch
from tests.support.world import run_world


def _train(run_dir: Path) -> Tensor:
    """Train; return the probabilities of all test images in one batch, by the model in memory."""
    models: list[nn.Module] = []
    convert = setup.convert_sync_batchnorm

    def convert_and_keep(module: nn.Module) -> nn.Module:
        models.append(convert(module))
        return models[-1]

    setup.convert_sync_batchnorm = convert_and_keep  # pyright: ignore[reportAttributeAccessIssue] -- stands in for it
    places = [f"run_dir={run_dir}", f"publish={run_dir.parent / 'models'}"]
    config = compose_config([*places, "track=none", "model.width=8", "epochs=2"])
    run = open_run_directory(config) if dist.get_rank() == 0 else None
    loop.train(config, run, torch.device("cpu"), quiet_watch())
    dataset = load_dataset(config.data, config.seed)  # standardized by what was trained on
    assert isinstance(dataset.test, TensorImages)
    with torch.no_grad():
        inputs = dataset.preprocessing.apply(dataset.test.samples)
        return models[0].eval()(inputs).softmax(1)


def test_model_appears_in_a_running_service_and_answers_alone_as_inside_a_batch(
    tmp_path: Path,
) -> None:
    test = digits().test
    assert isinstance(test, TensorImages)
    (tmp_path / "models").mkdir()
    served: list[Tensor] = []
    app = create_app(Settings(models=tmp_path / "models", poll_s=0.1))
    with TestClient(app) as client:
        assert client.get("/v2/models").json() == {"models": []}
        trained, _ = run_world(2, _train, tmp_path / "run", deadline_s=120)
        deadline = time.monotonic() + 60
        while client.get("/v2/models/digits-cnn/versions/1/ready").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        for sample in test.samples[:40]:
            image = {
                "name": "image",
                "shape": [1, 1, 8, 8],
                "datatype": "FP32",
                "data": sample.flatten().tolist(),
            }
            response = client.post("/v2/models/digits-cnn/infer", json={"inputs": [image]})
            assert response.status_code == 200
            served.append(torch.tensor(response.json()["outputs"][0]["data"]))
    torch.testing.assert_close(torch.stack(served), trained[:40], rtol=0, atol=1e-5)
