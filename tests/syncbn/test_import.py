import subprocess
import sys

HEAVY = (
    *("triton", "hydra", "omegaconf", "wandb", "fastapi", "pydantic", "sklearn", "torchvision"),
    *("httpx2", "msgspec"),
)


def test_importing_the_layer_loads_nothing_but_torch() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import syncbn;"
        f"print(*[name for name in {HEAVY} if name in set(sys.modules) - before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []
