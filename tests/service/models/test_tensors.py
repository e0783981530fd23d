import itertools
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.models.tensors import DATATYPES, Array, read_request, read_samples, write_response
from syncbn.bundle import InputSpec

SPEC = InputSpec(name="image", shape=(1, 2, 2), dtype="float32")
MODEL = ("shapes", "3")
CLASSES = ("circle", "square", "star")
SAMPLES = np.array([[[[0, 1], [2, 3]]], [[[4, 5], [6, 7]]]], np.float32)
PROBABILITIES = np.array([[0.25, 0.5, 0.25], [0.125, 0.125, 0.75]], np.float32)


def _body(rest: bytes = b"", /, **tensor: Any) -> tuple[bytes, int | None]:
    """Return a request for one tensor, and how long its JSON is if there is more."""
    given = {"name": "image", "shape": [2, 1, 2, 2], "datatype": "FP32"} | tensor
    head = json.dumps({"inputs": [given]}).encode()
    return head + rest, len(head) if rest else None


def _binary(rest: bytes, /, **tensor: Any) -> tuple[bytes, int | None]:
    return _body(rest, parameters={"binary_data_size": len(rest)}, **tensor)


def _read(body: bytes, json_bytes: int | None = None) -> Array:
    return read_samples(*read_request(body, json_bytes, SPEC), SPEC, 100)


def _answer(asked: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    content = json.dumps({"inputs": []} | asked).encode()
    request, _ = read_request(content, None, SPEC)
    body, json_bytes = write_response(request, MODEL, PROBABILITIES, CLASSES)
    return json.loads(body[:json_bytes]), b"" if json_bytes is None else body[json_bytes:]


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name not in ("FP16", "BF16")])
@pytest.mark.parametrize("nested", [True, False])
def test_numbers_of_any_datatype_are_read_from_json(datatype: str, nested: bool) -> None:
    data = SAMPLES.astype(int) if "INT" in datatype else SAMPLES
    listed = data.tolist() if nested else data.ravel().tolist()
    samples = _read(*_body(datatype=datatype, data=listed))
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, SAMPLES)


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "BF16"])
def test_numbers_of_any_datatype_are_read_from_binary(datatype: str) -> None:
    data = SAMPLES.astype(DATATYPES[datatype]).tobytes()
    np.testing.assert_array_equal(_read(*_binary(data, datatype=datatype)), SAMPLES)


def test_bfloat16_is_the_upper_half_of_a_float32() -> None:
    data = (SAMPLES.view(np.uint32) >> 16).astype("<u2").tobytes()
    np.testing.assert_array_equal(_read(*_binary(data, datatype="BF16")), SAMPLES)


def test_whole_body_is_one_sample_where_there_is_no_json() -> None:
    request, binary = read_request(SAMPLES[0].tobytes(), 0, SPEC)
    np.testing.assert_array_equal(read_samples(request, binary, SPEC, 1), SAMPLES[:1])
    body, json_bytes = write_response(request, MODEL, PROBABILITIES[:1], CLASSES)
    assert json_bytes is not None
    assert body[json_bytes:].startswith(PROBABILITIES[0].tobytes())


def test_samples_are_a_copy_that_outlives_the_body() -> None:
    body, json_bytes = _binary(SAMPLES.tobytes())
    samples = _read(body, json_bytes)
    assert samples.base is None or not isinstance(samples.base, bytes)
    assert samples.flags.writeable


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (_body(datatype="FP16", data=[0.5] * 8), "FP16 goes in binary only; send FP32 as JSON"),
        (_body(datatype="BF16", data=[0.5] * 8), "BF16 goes in binary only"),
        (_body(datatype="BYTES", data=["a"] * 8), "must have datatype FP32, or one of FP32, FP64"),
        (_body(datatype="BOOL", data=[True] * 8), "got 'BOOL'"),
        (_body(datatype="UINT8", data=[256] * 8), "Expected `int` <= 255"),
        (_body(datatype="INT8", data=[0.5] * 8), "Expected `int`, got `float`"),
        (_body(datatype="INT64", data=[2**63] * 8), "list of INT64 numbers"),
        (_body(), "has neither data nor binary_data_size"),
        (_body(data=None), "must be a list of FP32 numbers"),
        (_body(b"12345678"), "8 bytes follow the JSON, but its inputs announce 0 binary bytes"),
        (_body(b"1234", parameters={"binary_data_size": 8}), "announce 8 binary bytes"),
        (_body(b"1234", parameters={"binary_data_size": 3}), "announce 3 binary bytes"),
        (_body(parameters={"binary_data_size": -4}), "must be a number of bytes, got -4"),
        (_body(parameters={"binary_data_size": True}), "must be a number of bytes, got True"),
        (_body(parameters={"binary_data_size": 1e3}), "must be a number of bytes, got 1000.0"),
        (_binary(b"1234", data=[1]), "has both data and binary_data_size"),
        (_binary(b"1234"), "has 4 bytes, but FP32 of shape [2, 1, 2, 2] has 32"),
        (_binary(SAMPLES.tobytes()[:-1]), "has 31 bytes"),
        (_binary(b"\xff" * 32), "holds values that are not finite in FP32"),
        (_binary(np.full(8, 1e300).tobytes(), datatype="FP64"), "not finite in FP32"),
        (_body(parameters={"shared_memory_region": "a"}), "shared memory is not supported"),
        ((_binary(SAMPLES.tobytes())[0], 10**9), "says that 1000000000 of them are JSON"),
        ((b"", 0), "the body is not an inference request"),
        ((b"1234", 0), "has 4 bytes, but FP32 of shape [1, 1, 2, 2] has 16"),
    ],
)
def test_what_does_not_fit_is_refused(body: tuple[bytes, int | None], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        _read(*body)
    assert message in str(refusal.value)


def test_several_inputs_may_mix_json_and_binary_but_the_model_has_one() -> None:
    tensor = {"shape": [1], "datatype": "FP32"}
    inputs = [
        {"name": "a", "parameters": {"binary_data_size": 4}, **tensor},
        {"name": "b", "data": [1], **tensor},
        {"name": "c", "parameters": {"binary_data_size": 4}, **tensor},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    with pytest.raises(InvalidRequestError, match="expected the one input 'image', got"):
        _read(head + b"12345678", len(head))


def test_answer_is_json_unless_binary_is_asked_for() -> None:
    answer, rest = _answer({"id": "x"})
    assert rest == b""
    assert answer == {
        "model_name": "shapes",
        "model_version": "3",
        "id": "x",
        "outputs": [
            {
                "name": "probabilities",
                "datatype": "FP32",
                "shape": [2, 3],
                "data": PROBABILITIES.ravel().tolist(),
            },
            {"name": "label", "datatype": "BYTES", "shape": [2], "data": ["square", "star"]},
        ],
    }


LABELS = b"\x06\x00\x00\x00square\x04\x00\x00\x00star"


def test_all_outputs_may_be_binary() -> None:
    answer, rest = _answer({"parameters": {"binary_data_output": True}})
    assert rest == PROBABILITIES.tobytes() + LABELS
    sizes = [output["parameters"]["binary_data_size"] for output in answer["outputs"]]
    assert sizes == [24, len(LABELS)]
    assert all("data" not in output for output in answer["outputs"])


@pytest.mark.parametrize("by_default", [False, True])
@pytest.mark.parametrize("binary", [*itertools.product([False, True], repeat=2)])
def test_outputs_may_mix_json_and_binary(by_default: bool, binary: tuple[bool, bool]) -> None:
    names = ("label", "probabilities")
    outputs = [
        {"name": name, "parameters": {"binary_data": each}}
        for name, each in zip(names, binary, strict=True)
    ]
    asked = {"outputs": outputs, "parameters": {"binary_data_output": by_default}}
    answer, rest = _answer(asked)
    assert [output["name"] for output in answer["outputs"]] == list(names)
    assert ["data" not in output for output in answer["outputs"]] == list(binary)
    assert rest == LABELS * binary[0] + PROBABILITIES.tobytes() * binary[1]


def test_classification_answers_with_the_best_classes() -> None:
    def ask(most: int) -> dict[str, Any]:
        output = {"name": "probabilities", "parameters": {"classification": most}}
        return _answer({"outputs": [output]})[0]

    answer = ask(2)
    assert answer["outputs"] == [
        {
            "name": "probabilities",
            "datatype": "BYTES",
            "shape": [2, 2],
            "data": [
                "0.500000:1:square",
                "0.250000:0:circle",
                "0.750000:2:star",
                "0.125000:0:circle",
            ],
        }
    ]
    assert ask(99)["outputs"][0]["shape"] == [2, 3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"outputs": [{"name": "logits"}]}, "unknown output 'logits'; choose of probabilities"),
        ({"outputs": [{"name": "label"}] * 2}, "output 'label' is asked for twice"),
        (
            {"parameters": {"binary_data_output": 1}},
            "binary_data_output of the request must be true or false, got 1",
        ),
        (
            {"outputs": [{"name": "label", "parameters": {"binary_data": "yes"}}]},
            "binary_data of output 'label' must be true or false, got 'yes'",
        ),
        (
            {"outputs": [{"name": "probabilities", "parameters": {"classification": -1}}]},
            "must be a number of classes, got -1",
        ),
        (
            {"outputs": [{"name": "label", "parameters": {"shared_memory_region": "x"}}]},
            "shared memory is not supported",
        ),
    ],
)
def test_wrong_output_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        _answer(asked)
    assert message in str(refusal.value)


@settings(max_examples=300, deadline=None)
@given(
    data=st.binary(max_size=64),
    json_bytes=st.none() | st.integers(0, 400),
    announced=st.none() | st.integers(-1, 64),
    cut=st.integers(0, 40),
    noise=st.none() | st.tuples(st.integers(0, 300), st.integers(0, 255)),
)
def test_any_bytes_are_read_or_refused(
    data: bytes,
    json_bytes: int | None,
    announced: int | None,
    cut: int,
    noise: tuple[int, int] | None,
) -> None:
    parameters = {} if announced is None else {"binary_data_size": announced}
    body = bytearray(_body(data, parameters=parameters)[0])
    if noise is not None:
        body[noise[0] % len(body)] = noise[1]
    try:
        samples = _read(bytes(body[: len(body) - cut]), json_bytes)
    except InvalidRequestError:
        return
    assert samples.shape[1:] == SPEC.shape
    assert np.isfinite(samples).all()


def test_binary_words_carry_their_length() -> None:
    words = ["", "é", "a" * 300]
    request, _ = read_request(b'{"inputs":[],"outputs":[{"name":"label"}]}', None, SPEC)
    request.parameters = {"binary_data_output": True}
    body, json_bytes = write_response(request, MODEL, np.eye(3, dtype=np.float32), words)
    assert json_bytes is not None
    rest = body[json_bytes:]
    for word in words:
        (length,) = struct.unpack_from("<I", rest)
        assert rest[4 : 4 + length].decode() == word
        rest = rest[4 + length :]
    assert rest == b""
