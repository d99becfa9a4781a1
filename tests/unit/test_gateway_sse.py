"""Server-sent events, cut anywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.sse import EventTooLarge, SseParser, encode


def parse(stream: bytes, cuts: list[int]) -> list[str]:
    parser, events, start = SseParser(10_000), [], 0
    for cut in [*sorted(cuts), len(stream)]:
        events += parser.feed(stream[start:cut])
        start = cut
    return events


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", ["a"]),
        (b"data:a\n\ndata:  b\n\n", ["a", " b"]),
        (b"data: a\r\n\r\ndata: b\r\rdata: c\n\n", ["a", "b", "c"]),
        (b"data: a\ndata: b\n\n", ["a\nb"]),
        (b": comment\n\nevent: x\nid: 7\nretry: 1\ndata: a\n\n", ["a"]),
        (b"data\n\n", [""]),
        (b"data: a\r\n\n", ["a"]),
        (b"\xef\xbb\xbfdata: a\n\n", ["a"]),
        (b"data: a\n", []),
        (b"data: a", []),
        (b"\n\n\n", []),
        ("data: é😀\n\n".encode(), ["é😀"]),
        (b"data: \xff\n\n", ["\ufffd"]),
    ],
)
def test_events(stream: bytes, events: list[str]) -> None:
    assert parse(stream, []) == events
    assert parse(stream, list(range(len(stream)))) == events, "one byte at a time"


LINES = st.sampled_from(["data: a", "data:b é😀", "data", ": note", "event: x", "datax: y", "", ""])


@given(st.lists(st.tuples(LINES, st.sampled_from(["\n", "\r\n", "\r"]))), st.data())
def test_boundaries_make_no_difference(lines: list[tuple[str, str]], data: st.DataObject) -> None:
    stream = "".join(line + end for line, end in lines).encode()
    cuts = data.draw(st.lists(st.integers(0, len(stream))))
    assert parse(stream, cuts) == parse(stream, [])


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"))))
def test_what_is_encoded_is_read_back(texts: list[str]) -> None:
    assert parse(b"".join(encode(text) for text in texts), []) == texts


@pytest.mark.parametrize("piece", [b"x" * 400, b"data: " + b"y" * 50 + b"\n"])
def test_endless_event_is_refused(piece: bytes) -> None:
    parser = SseParser(1000)
    with pytest.raises(EventTooLarge):
        _ = [parser.feed(piece) for _ in range(100)]
