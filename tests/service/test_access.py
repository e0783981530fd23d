from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from service.access import Doorkeeper, is_loopback
from service.app import create_app
from service.errors import ForbiddenError, MediaTypeError
from service.settings import Settings

JSON = {b"content-type": b"application/json"}


def _check(
    host: bytes,
    origin: bytes | None = None,
    *,
    at: str = "127.0.0.1",
    allowed: tuple[str, ...] = (),
    method: str = "POST",
) -> None:
    keeper = Doorkeeper(at, allowed, ["https://page.example/"])
    keeper.check(method, JSON | {b"host": host} | ({} if origin is None else {b"origin": origin}))


@pytest.mark.parametrize(
    "host",
    [b"127.0.0.1:8000", b"127.0.0.1", b"localhost:8000", b"LOCALHOST", b"[::1]:8000", b"127.9.9.9"],
)
def test_this_machine_is_known_by_its_loopback_names(host: bytes) -> None:
    _check(host)
    _check(host, at="localhost")


@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil.example:8000",
        b"",
        b"127.0.0.1.evil.example",
        b"localhost.evil",
        b"[",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_name_that_was_made_to_point_to_this_machine_is_refused(host: bytes, method: str) -> None:
    with pytest.raises(ForbiddenError, match="--allowed-hosts"):
        _check(host, method=method)


def test_allowed_hosts_are_the_only_ones_on_other_addresses() -> None:
    _check(b"any.example", at="0.0.0.0")
    _check(b"jobs.example:8000", at="0.0.0.0", allowed=("Jobs.example",))
    _check(b"jobs.example:8000", allowed=("jobs.example:8000",))
    with pytest.raises(ForbiddenError, match=r"not known as 'any\.example'"):
        _check(b"any.example", at="0.0.0.0", allowed=("jobs.example",))


@pytest.mark.parametrize("origin", [None, b"http://localhost:8000", b"https://page.example"])
def test_own_pages_and_those_that_were_named_may_ask(origin: bytes | None) -> None:
    _check(b"localhost:8000", origin)


@pytest.mark.parametrize(
    "origin",
    [b"https://evil.example", b"null", b"http://localhost:3000", b"https://page.example.x"],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_origins_are_refused(origin: bytes, method: str) -> None:
    with pytest.raises(ForbiddenError, match="may not use this service"):
        _check(b"localhost:8000", origin, method=method)


@pytest.mark.parametrize(
    "media_type",
    [b"", b"text/plain", b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"],
)
def test_what_a_form_can_send_changes_nothing(media_type: bytes) -> None:
    keeper = Doorkeeper("127.0.0.1", (), ())
    headers = {b"host": b"localhost", b"content-type": media_type}
    with pytest.raises(MediaTypeError, match="need Content-Type: application/json"):
        keeper.check("POST", headers)
    keeper.check("GET", headers)
    keeper.check("POST", headers | {b"content-type": b"Application/JSON; charset=utf-8"})


def test_loopback_is_told_from_names_that_look_like_it() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "::1", "[::1]")))
    assert not any(map(is_loopback, ("", "0.0.0.0", "localhost.example", "10.0.0.1", "::")))


def test_doorkeeper_stands_before_the_jobs_and_not_before_the_models(models: Path) -> None:
    with TestClient(create_app(Settings(models=models)), base_url="http://evil.example") as client:
        assert client.get("/v2/models").status_code == 200
        assert client.get("/v1/jobs").status_code == 403
        assert client.post("/v1/jobs", json={}).status_code == 403
