"""What may be configured of the service: by command line, or by SYNCBN_ environment variables."""

from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Serve trained bundles over HTTP.

    Every option may also be given as an environment variable: --models as SYNCBN_MODELS.
    """

    model_config = SettingsConfigDict(
        env_prefix="SYNCBN_",
        cli_prog_name="syncbn-serve",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_implicit_flags=True,
        extra="forbid",
    )

    models: Path = Field(
        description="a bundle, or a directory of bundles, or of directories of their versions"
    )
    jobs: Path | None = Field(
        default=None,
        description="directory of training jobs, made if it is not there; none: this service takes "
        "no jobs",
    )
    dispatcher: bool = Field(
        default=True,
        description="start the jobs too; --no-dispatcher: syncbn-dispatch does it elsewhere",
    )
    dispatcher_cores: int | None = Field(
        default=None, ge=1, description="how many cores jobs get; none: all of them"
    )
    dispatcher_gpus: int | None = Field(
        default=None, ge=0, description="how many GPUs jobs get; none: all of them"
    )
    dispatcher_engine: Literal["local", "ray", "slurm"] = Field(
        default="local", description="where jobs run"
    )
    max_streams: int = Field(
        default=256, gt=0, description="most streams of events of jobs that one worker has open"
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0: any free one"
    )
    workers: int = Field(
        default=1, ge=1, le=256, description="processes that serve; each loads every model"
    )
    threads: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="torch threads of one prediction; 0: the cores divided by the workers",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where models compute; auto: CUDA where there is one"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="what models compute in; bfloat16 is faster and less exact"
    )
    compile: bool = Field(
        default=False, description="compile models with torch.compile before they are ready"
    )
    max_batch_size: int = Field(
        default=32, gt=0, le=65536, description="most samples that one forward computes"
    )
    max_batch_bytes: int = Field(
        default=256 << 20,
        gt=0,
        description="most bytes of input and output that one forward computes, in float32; a "
        "sample that has more goes alone",
    )
    max_request_rows: int = Field(
        default=1024, gt=0, description="most samples accepted in one request"
    )
    max_queue_rows: int = Field(
        default=4096, gt=0, description="most samples that wait for one model; more are refused"
    )
    max_queue_bytes: int = Field(
        default=2 << 30,
        gt=0,
        description="most bytes of samples that wait for one model; more are refused",
    )
    max_answer_bytes: int = Field(
        default=64 << 20,
        gt=0,
        description="largest answer of tensors, before compression; a request for more is refused",
    )
    max_body_bytes: int = Field(default=16 << 20, gt=0, description="largest request body accepted")
    max_image_pixels: int = Field(
        default=50_000_000, gt=0, description="largest image file that is decoded, in pixels"
    )
    timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=86400,
        description="longest wait for one prediction, for a body, and for requests under way at "
        "shutdown",
    )
    poll_s: float = Field(
        default=2.0, gt=0, le=86400, description="how often to look for new bundles"
    )
    versions: int = Field(
        default=1, ge=1, le=1000, description="how many of a model's newest versions are served"
    )
    api_keys: Path | None = Field(
        default=None, description="file of API keys as syncbn-keys writes it; none: no keys needed"
    )
    no_auth: bool = Field(
        default=False,
        description="ask for no keys, even where the address can be reached from other machines",
    )
    cors_origins: list[str] = Field(
        default=[], description="origins whose pages may use the API from a browser"
    )
    allowed_hosts: list[str] = Field(
        default=[],
        description="names that the service is reached by, for requests about jobs; without, those "
        "of this machine alone on a loopback address, and any on others",
    )
    drift: bool = Field(
        default=True, description="compare a sample of the inputs with the running statistics"
    )
    log_format: Literal["auto", "json", "text"] = Field(
        default="auto",
        description="how log lines look: json for machines, text for people; auto: text on a "
        "terminal",
    )
    telemetry: bool = Field(
        default=False,
        description="send OpenTelemetry traces, as the OTEL_ environment variables say; needs the "
        "extra syncbn[telemetry]",
    )
    allow_imports: bool = Field(
        default=False,
        description="load bundles whose architecture is an import path, which runs the code that "
        "they name: only for bundles from those whom you trust",
    )
