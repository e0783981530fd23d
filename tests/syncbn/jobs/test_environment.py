"""Jobs get what Python and torch heed of the dispatcher's environment, and no secret."""

import pytest

from syncbn.jobs.dispatch.environment import environment_for_jobs


@pytest.mark.parametrize(
    "name",
    [
        *("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "WANDB_API_KEY", "HF_TOKEN", "PGPASSWORD"),
        *("DATABASE_URL", "SYNCBN_API_KEY", "SYNCBN_API_KEYS", "GITHUB_TOKEN", "SSH_AUTH_SOCK"),
        *("http_proxy", "KRB5CCNAME", "GOOGLE_APPLICATION_CREDENTIALS", "MY_OWN", ""),
        # Named like what torch heeds, but a secret by its name.
        *("TORCH_API_KEY", "NVIDIA_TOKEN", "NCCL_password", "CUDA_SECRET_1", "LC_CREDENTIALS"),
        # By which whoever may set one would run code in each job.
        *("PYTHONSTARTUP", "PYTHONINSPECT", "BASH_ENV", "PROMPT_COMMAND"),
    ],
)
def test_what_may_be_a_secret_is_not_passed_on(name: str) -> None:
    assert environment_for_jobs({name: "x"}) == {}


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "PYTHONPATH", "VIRTUAL_ENV"),
        *("LD_LIBRARY_PATH", "NCCL_SOCKET_IFNAME", "OMP_PROC_BIND", "TORCH_HOME"),
    ],
)
def test_what_python_and_torch_heed_is_passed_on(name: str) -> None:
    assert environment_for_jobs({name: "x"}) == {name: "x"}
