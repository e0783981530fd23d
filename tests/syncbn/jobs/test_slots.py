"""Which cores and GPUs are free, and who comes first."""

from syncbn.jobs.dispatch.slots import Capacity, Free, rank


def test_lowest_numbers_are_given_first() -> None:
    assert Free((1, 3, 5), (0,)).place(2, 0) == {"cores": [1, 3], "gpus": []}


def test_job_gets_distinct_gpus() -> None:
    assert Free((0, 1), (0, 0)).place(1, 2) is None
    assert Free((0, 1), (0, 0, 1)).place(1, 2) == {"cores": [0], "gpus": [0, 1]}


def test_nothing_is_given_where_something_lacks() -> None:
    assert Free((0,), ()).place(2, 0) is None
    assert Free((0,), ()).place(1, 1) is None


def test_priority_is_worth_a_time_of_waiting() -> None:
    early, late = rank(1000.0, 0, 600.0), rank(1500.0, 1, 600.0)
    assert late < early
    assert rank(1601.0, 1, 600.0) > early


def test_capacity_is_one_job_a_gpu() -> None:
    assert Capacity((0,), (0,)).jobs_per_gpu == 1
