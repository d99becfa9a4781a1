"""What benchmarks share."""

from services.common.benchmarks import in_turns


def test_ways_take_turns_and_the_first_round_is_not_counted() -> None:
    asked: list[tuple[str, int]] = []

    def measure(way: str, number: int) -> str:
        asked.append((way, number))
        return f"{way}{number}"

    assert in_turns("abc", 2, measure) == {"a": ["a1", "a2"], "b": ["b1", "b2"], "c": ["c1", "c2"]}
    assert asked == [(way, number) for number, ways in enumerate(("abc", "bca", "cab")) for way in ways]
