import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY, run

PROGRAM = """
import json, sys, urllib.request
import ray
from ray import serve
from service.cluster import build
models, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(build({"models": models, "replicas": "2", "cpus": "0.5"}), name="syncbn")
url = f"http://127.0.0.1:{port}/v2/models/shapes/infer"
tensor = {"name": "image", "shape": [1, 1, 4, 4], "datatype": "FP32", "data": [0.5] * 16}
body = json.dumps({"inputs": [tensor]}).encode()
for _ in range(10):
    with urllib.request.urlopen(url, body, timeout=60) as answer:
        print("answer", answer.read().decode())
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.long
def test_replicas_on_a_cluster_answer_alike(models: Path, tmp_path: Path) -> None:
    installed = [sys.executable, "-c", "import ray.serve"]
    if subprocess.run(installed, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("the extra `ray` is not installed")
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", PROGRAM, str(models), "18765"]
    result = run(command, tmp_path, 300, PYTHONPATH=path, RAY_USAGE_STATS_ENABLED="0")
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("answer ")]
    assert len(lines) == 10
    assert len(set(lines)) == 1
    assert json.loads(lines[0].removeprefix("answer "))["model_name"] == "shapes"
