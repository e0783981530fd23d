from pathlib import Path

import pytest

from service.jobs import console
from service.jobs.console import read_piece

TEXT = """=== attempt 1, 2026-11-30T14:00:00Z ===
first
=== attempt 2, 2026-11-30T15:00:00Z ===
ä€😀
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "console.log"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7, 1000])
def test_pieces_of_any_size_end_between_letters_and_are_the_whole(file: Path, limit: int) -> None:
    offset, text = 0, ""
    size = len(TEXT.encode())
    while offset < size:
        piece = read_piece(file, offset, max(limit, 4))
        assert (piece.start, piece.size_bytes) == (offset, size)
        text += piece.text.decode()
        offset = piece.end
    assert text == TEXT
    assert read_piece(file, size, 10).text == b""
    assert read_piece(file, size + 5, 10).end == size


def test_negative_offset_counts_from_the_end(file: Path) -> None:
    assert read_piece(file, -6, 100).text.decode() == "😀\n"[-6:]
    piece = read_piece(file, -3, 100)  # in the middle of the last letter but one
    assert piece.text == b"\n"
    assert piece.end == piece.size_bytes
    assert read_piece(file, -10_000, 100).start == 0


def test_attempt_is_read_as_if_it_were_all(file: Path) -> None:
    first, second = (read_piece(file, 0, 1000, attempt) for attempt in (1, 2))
    assert first.text.decode() == TEXT[: TEXT.index("=== attempt 2")]
    assert second.text.decode() == TEXT[TEXT.index("=== attempt 2") :]
    assert (first.end, second.end) == (first.size_bytes, second.size_bytes)
    assert read_piece(file, 40, 1000, 1).text == b"first\n"
    with pytest.raises(LookupError):
        read_piece(file, 0, 1000, 3)


@pytest.mark.parametrize("part", [130, 150, 200, 1 << 20])
def test_attempts_are_found_wherever_parts_of_a_long_log_end(
    file: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(console, "MAX_PIECE_BYTES", part)
    heads = [f"=== attempt {n}, 2026-11-30T14:00:00Z ===\n" for n in range(1, 40)]
    parts = [head + "x" * (7 * n) + "\n" for n, head in enumerate(heads)]
    file.write_text("".join(parts))
    for n, text in enumerate(parts, 1):
        assert read_piece(file, 0, 1000, n).text.decode() == text


def test_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_piece(tmp_path / "none", 5, 10) == console.Piece(b"", 0, 0, 0)
    with pytest.raises(LookupError):
        read_piece(tmp_path / "none", 0, 10, 1)


def test_bytes_that_are_no_letters_are_given_as_they_are(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x80\x80\x80\x80\x80 and so on")
    assert read_piece(file, 0, 4).text
    text, offset = b"", 0
    while (piece := read_piece(file, offset, 4)).text:
        text, offset = text + piece.text, piece.end
    assert text == file.read_bytes()
