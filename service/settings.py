"""What may be configured of the service: by command line, or by SYNCBN_ environment variables."""

from pathlib import Path

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

    models: Path = Field(description="a bundle, or a directory of bundles")
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(
        default=8000, ge=0, le=65535, description="port to listen on; 0: any free one"
    )
    timeout_s: float = Field(default=30.0, gt=0, description="longest wait for one prediction")
    max_body_bytes: int = Field(default=16 << 20, gt=0, description="largest request body accepted")
    max_batch_size: int = Field(
        default=1024, gt=0, description="most samples accepted in one request"
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="threads of one prediction; 0: as torch chooses"
    )
    allow_imports: bool = Field(
        default=False,
        description="load bundles whose architecture is an import path, which runs the code that "
        "they name: only for bundles from those whom you trust",
    )
