"""A service that trains nothing, and both clients of it, asked alike."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

import pytest

from syncbn.client import AsyncJobsClient, JobsClient
from tests.support.fake_jobs import FakeJobs, serving


class AwaitedClient:
    """An `AsyncJobsClient` whose methods are awaited here, so that one test asks both clients."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = AsyncJobsClient(*arguments, **options)
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self._client, name)(*arguments, **options)
            if isinstance(result, AsyncIterator):
                return self._iterate(result)
            return self._runner.run(result)

        return call

    def _iterate(self, results: AsyncIterator[Any]) -> Iterator[Any]:
        async def next_one() -> Any:
            return await anext(results)

        while True:
            try:
                yield self._runner.run(next_one())
            except StopAsyncIteration:
                return

    def __enter__(self) -> "AwaitedClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(scope="session")
def served() -> Generator[tuple[FakeJobs, str]]:
    fake = FakeJobs()
    with serving(fake) as url:
        yield fake, url


@pytest.fixture
def fake(served: tuple[FakeJobs, str]) -> FakeJobs:
    served[0].reset()
    return served[0]


@pytest.fixture
def url(served: tuple[FakeJobs, str], fake: FakeJobs) -> str:
    return served[1]


@pytest.fixture(params=[JobsClient, AwaitedClient], ids=["blocking", "awaited"])
def client_class(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def client(client_class: Any, url: str) -> Generator[Any]:
    with client_class(url) as client:
        yield client
