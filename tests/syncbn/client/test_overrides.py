"""What is typed is read as Hydra reads it, as far as it can be submitted."""

from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString, RangeSweep
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from syncbn.client.overrides import read_overrides
from syncbn.errors import SubmissionError

HYDRA = OverridesParser.create()


def hydra_values(word: str) -> list[Any]:
    """Return what Hydra makes of a word: one value, or those of a sweep."""
    value: Any = HYDRA.parse_override(word).value()
    if isinstance(value, ChoiceSweep):
        return [plain(each) for each in value.list]
    if isinstance(value, RangeSweep):
        return list(value.range())
    return [plain(value)]


def plain(value: Any) -> Any:
    if isinstance(value, QuotedString):
        return value.text
    return [plain(each) for each in value] if isinstance(value, list) else value


def typed(value: Any) -> Any:
    """Return a value that is equal only to one of the same type."""
    return (
        [typed(each) for each in value] if isinstance(value, list) else (type(value), repr(value))
    )


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "NULL",
        "true",
        "False",
        "yes",
        "on",
        "0",
        "-1",
        "+1",
        "010",
        "1_000",
        "1__0",
        "0x10",
        "1:30",
        "2026-11-30",
        "0.1",
        ".5",
        "5.",
        "1e-3",
        "-1E5",
        "1e",
        "inf",
        "-INF",
        "sgd",
        "resnet18",
        "a b",
        " a ",
        "",
        "a-b_c/d.e",
        "'a, b'",
        '"a"',
        "'it\\'s'",
        "''",
        "[1,2]",
        "[ 1 , two, 'three, four' ]",
        "[]",
        "[null,true,1e-3]",
        "1,2,3",
        "sync, local",
        "[1,2],[3]",
        "'a,b',c",
        "choice(sync,local)",
        "choice(1)",
        "range(3)",
        "range(1,4)",
        "range(10, 0, -5)",
        "50%",
        "backbone.*",
        "a: ",
        " : ,[b: , c :]",
    ],
)
def test_values_are_those_of_hydra(text: str) -> None:
    (override,) = read_overrides([f"k={text}"], is_sweep=True)
    assert typed(list(override.values)) == typed(hydra_values(f"k={text}"))


@settings(max_examples=500, deadline=None)
@given(st.text("ab019 .,-+_e'\"[]()nulltrefs:=%*/", max_size=12))
def test_whatever_is_read_is_what_hydra_reads(text: str) -> None:
    try:
        (override,) = read_overrides([f"k={text}"], is_sweep=True)
    except SubmissionError:
        return
    try:
        expected = hydra_values(f"k={text}")
    except HydraException:
        # Some texts need quotes for Hydra; here they are what they seem to be.
        assert any(isinstance(value, str | list) for value in override.values)
        return
    assert typed(list(override.values)) == typed(expected)


def test_keys_may_have_the_signs_of_hydra() -> None:
    overrides = read_overrides(["+model.arguments.aux_loss=true", "++a=1", "b-c=2"], False)
    assert [each.key for each in overrides] == ["model.arguments.aux_loss", "a", "b-c"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("epochs", "'epochs': must be KEY=VALUE, such as optim.lr=0.05"),
        ("=1", "'=1': must be KEY=VALUE"),
        ("~epochs", "'~epochs': must be KEY=VALUE"),
        ("a={b:1}", "a={b:1}: a mapping or a list within a list cannot be submitted"),
        ("a=[[1]]", "a mapping or a list within a list"),
        ("a=[1", "a=[1: ] is missing at the end"),
        ("a='b", "a='b: ' is missing at the end"),
        ("a=1]", "a=1]: the bracket ] closes nothing"),
        ("a=1,,2", "a=1,,2: between two commas, there is no value"),
        ("a='b'c", "a='b'c: the quote ' must be around the whole text"),
        ("a=[1]2", "a=[1]2: after the list there is something else"),
        ("a=glob(*)", "a=glob(*): of functions, only choice(A,B) and range(FIRST,END)"),
        ("a=choice()", "a=choice(): of functions, only"),
        ("a=range(0,1,0.5)", "of integers"),
        ("a=range(1,4,0)", "a step of 0 never comes to the end"),
        ("a=range(0)", "a=range(0): has 0 values"),
        ("a=range(1000000000)", "has 1000000000 values; it must have 1 to 10000"),
        (f"a={'9' * 5000}", "the number is too long"),
    ],
)
def test_what_cannot_be_submitted_is_refused_with_a_reason(word: str, said: str) -> None:
    with pytest.raises(SubmissionError) as raised:
        read_overrides([word], is_sweep=True)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300


def test_several_values_need_a_sweep() -> None:
    with pytest.raises(SubmissionError, match=r"^seed=1,2: has several values; -m submits one job"):
        read_overrides(["seed=1,2"], is_sweep=False)


def test_key_that_is_there_twice_is_refused() -> None:
    with pytest.raises(SubmissionError, match=r"^\+seed=2: seed is there twice; leave one out$"):
        read_overrides(["seed=1", "+seed=2"], is_sweep=False)
