"""`python -m service` and `syncbn-serve`: the service from the command line."""

import asyncio
import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError
from pydantic_settings import CliApp

from service.access import is_loopback
from service.auth import KeysFileError
from service.settings import Settings
from syncbn.errors import SyncBNError

if TYPE_CHECKING:
    # Torch and the web take seconds to import, which whoever mistyped an option need not wait for.
    import uvicorn
    from fastapi import FastAPI

    from service.jobs.dispatcher import DispatcherChild

# How the command tells its workers of itself.
_SETTINGS, _STATE_DIR = "SYNCBN_WORKER_SETTINGS", "SYNCBN_WORKER_STATE_DIR"
_METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"
_KEEP_ALIVE_S = 75  # longer than load balancers keep a connection that they may still use
_HEALTH_TIMEOUT_S = 15  # after which a worker that does not say that it lives is replaced


def main() -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first, within `timeout_s`.

    Raises:
        SystemExit: with code 2 where an option is wrong, 1 where a model, the keys or the port are
            not to be had.
    """
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        reasons = (f"--{item['loc'][0]}: {item['msg']}" for item in error.errors())
        _fail(f"{'; '.join(reasons).replace('_', '-')}; see --help", 2)
    if settings.jobs is not None:
        _prepare_models(settings)
    if not settings.models.is_dir():
        _fail(
            f"{settings.models} is not a directory; name a bundle or a directory of them with "
            "--models",
            1,
        )
    if settings.telemetry and find_spec("opentelemetry.sdk") is None:
        _fail("--telemetry needs what pip install 'syncbn[telemetry]' installs", 1)
    os.environ.setdefault("OTEL_SERVICE_NAME", "syncbn")
    listener, url = _listen(settings)
    try:
        if settings.workers == 1:
            _serve_alone(settings, listener, url)
        else:
            _serve_together(settings, listener, url)
    except (SyncBNError, KeysFileError) as error:
        _fail(str(error), 1)


def _prepare_models(settings: Settings) -> None:
    """Make a directory for the models that jobs publish, before there is any."""
    if (settings.models / "bundle.json").exists():
        _fail(
            f"{settings.models} is a bundle, and jobs publish theirs beside others: name a "
            "directory of bundles with --models",
            1,
        )
    try:
        settings.models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _fail(f"cannot make {settings.models}: {error.strerror}", 1)


def _listen(settings: Settings) -> tuple[socket.socket, str]:
    """Return the socket that listens, and its URL."""
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        if not (settings.api_keys or settings.no_auth or is_loopback(str(address[0]))):
            _fail(
                f"{settings.host} can be reached from other machines, so keys are needed: make one "
                "with syncbn-keys FILE --scope infer, and name the file with --api-keys; or let "
                "everybody in with --no-auth",
                2,
            )
        listener = socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", 1)
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    return listener, f"http://{host}:{listener.getsockname()[1]}"


def _serve_alone(settings: Settings, listener: socket.socket, url: str) -> None:
    import uvicorn
    import uvloop

    from service import logs
    from service.app import create_app, prepare_process

    logs.configure(settings.log_format)
    prepare_process()

    dispatcher = _dispatcher(settings)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if dispatcher is not None:
                dispatcher.tell()
            super().handle_exit(sig, frame)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            # What told it to stop ends the process next.
            await asyncio.to_thread(children.close)

    async def serve() -> None:
        app = create_app(settings)
        # Before the server starts, as it would show a refused bundle by a traceback.
        await app.state.registry.open()
        if dispatcher is not None:
            children.enter_context(dispatcher)
        _announce(settings, url)
        await Server(_config(app, settings)).serve([listener])

    with (
        contextlib.ExitStack() as children,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(serve())


def _dispatcher(settings: Settings) -> "DispatcherChild | None":
    """Return what starts the jobs, if there are any and it is not somebody else's affair."""
    if settings.jobs is None or not settings.dispatcher:
        return None
    from service.jobs.dispatcher import DispatcherChild, command_of

    return DispatcherChild(command_of(settings))


def _serve_together(settings: Settings, listener: socket.socket, url: str) -> None:
    """Run workers that share the socket; one that ends is replaced."""
    from uvicorn.supervisors import Multiprocess

    from service import logs

    class Workers(Multiprocess):
        def keep_subprocess_alive(self) -> None:
            for each in self.processes:
                # While the command has the worker's end open too, a worker that was killed while
                # it was asked how it does would look alive until the time-out.
                each.child_conn.close()
            super().keep_subprocess_alive()

    logs.configure(settings.log_format)
    if settings.jobs is not None:
        from service.jobs.control_plane import ControlPlane

        # A worker that ended for a wrong setting would be replaced for ever.
        ControlPlane(settings.jobs, timeout_s=settings.timeout_s).close()
    with (
        tempfile.TemporaryDirectory(prefix="syncbn-serve-") as directory,
        contextlib.ExitStack() as children,
    ):
        state_dir, metrics_dir = Path(directory) / "state", Path(directory) / "metrics"
        state_dir.mkdir()
        metrics_dir.mkdir()
        os.environ[_SETTINGS] = settings.model_dump_json()
        os.environ[_STATE_DIR] = str(state_dir)
        os.environ[_METRICS_DIR] = str(metrics_dir)
        config = _config("service.__main__:worker_app", settings)
        config.workers = settings.workers
        config.factory = True
        config.timeout_worker_healthcheck = _HEALTH_TIMEOUT_S
        if (dispatcher := _dispatcher(settings)) is not None:
            children.enter_context(dispatcher)
        _announce(settings, url)
        Workers(config, [listener]).run()


def worker_app() -> "FastAPI":
    """Return the app of one of several workers, which ends when the command does."""
    from service import logs
    from service.app import create_app, prepare_process

    settings = Settings.model_validate_json(os.environ[_SETTINGS])
    logs.configure(settings.log_format)
    prepare_process()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_with_parent, name="parent", daemon=True).start()
    # Bundles that cannot be loaded are shown in the index: a worker that ended would be replaced,
    # and its successor fail likewise.
    return create_app(settings, state_dir=Path(os.environ[_STATE_DIR]), strict=False)


def _config(app: "FastAPI | str", settings: Settings) -> "uvicorn.Config":
    import uvicorn

    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        access_log=False,  # the middleware writes it
        log_config=None,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        # A client that stalls must not keep the process from stopping.
        timeout_graceful_shutdown=math.ceil(settings.timeout_s),
    )


def _announce(settings: Settings, url: str) -> None:
    print(f"serving {settings.models} at {url}, its API at {url}/docs", flush=True)
    if settings.jobs is not None:
        print(f"training jobs in {settings.jobs}, at {url}/jobs", flush=True)


def _fail(message: str, code: int) -> NoReturn:
    print(f"syncbn-serve: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
