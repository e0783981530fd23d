"""`python -m service` and `syncbn-serve`: the service from the command line."""

import math
import socket
import sys
from typing import NoReturn

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from service.app import create_app
from service.settings import Settings
from syncbn.errors import BundleError


def main() -> None:
    """Serve until SIGINT or SIGTERM; requests under way are answered first, within `timeout_s`.

    Raises:
        SystemExit: with code 2 where an option is wrong, 1 where a model or the port is not to be
            had.
    """
    try:
        settings = CliApp.run(Settings)
    except ValidationError as error:
        reasons = (f"--{item['loc'][0]}: {item['msg']}" for item in error.errors())
        _fail(f"{'; '.join(reasons).replace('_', '-')}; see --help", 2)
    try:
        app = create_app(settings)
    except BundleError as error:
        _fail(str(error), 1)
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        _fail(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}", 1)
    host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    print(f"serving {settings.models} at {url}, its API at {url}/docs", flush=True)
    # A client that stalls must not keep the process from stopping.
    patience_s = math.ceil(settings.timeout_s)
    config = uvicorn.Config(app, workers=1, timeout_graceful_shutdown=patience_s)
    uvicorn.Server(config).run(sockets=[listener])


def _fail(message: str, code: int) -> NoReturn:
    print(f"syncbn-serve: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
