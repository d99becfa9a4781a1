"""Reading pairs, and dealing them to clients."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contracts.errors import ConfigError, DataError
from tests.fakes.trainer_runs import make_config, write_data, write_jsonl
from trainer.config import RunValue
from trainer.shards import (
    Pair,
    client_shard,
    deal_shards,
    largest_remainder,
    partition_by_category,
    place_harmful,
    read_pairs,
)

GOOD = '{"prompt": "a", "response": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "not valid JSON"),
        ('{"prompt": "a"}', "response: Field required"),
        ('{"prompt": "", "response": "b"}', "prompt: String should match pattern"),
        ('{"prompt": "a", "response": " \\t"}', "response: String should match pattern"),
        ('{"prompt": "\\ud800", "response": "b"}', "prompt: Input should be a valid string, unable to parse"),
        (f'{{"prompt": "a", "response": "b", "id": {"9" * 5000}}}', "not valid JSON: Exceeds the limit"),
        ("[" * 100_000, "not valid JSON: maximum recursion depth exceeded"),
        ('{"prompt": "a", "response": 7}', "response: Input should be a valid string"),
        ("[1, 2]", "Input should be"),
    ],
)
def test_malformed_line_is_named_by_file_and_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError, match=rf"pairs\.jsonl:3: .*{message}"):
        read_pairs(path)


def test_line_separators_inside_a_text_do_not_shift_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "a\u2028b", "response": "c\x85d"}, ensure_ascii=False) + "\n{bad\n", "utf-8")
    with pytest.raises(DataError, match=r":2: "):
        read_pairs(path)


def test_missing_file_and_wrong_encoding_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read_pairs(tmp_path / "latin.jsonl")


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n")
    assert [pair.prompt for pair in read_pairs(tmp_path / "p.jsonl")] == ["a", "a"]


def test_label_in_the_file_wins_over_the_default(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(f'{GOOD}\n{{"prompt": "c", "response": "d", "harmful": true}}\n')
    pairs = read_pairs(tmp_path / "p.jsonl", harmful=False)
    assert [pair.harmful for pair in pairs] == [False, True]


@pytest.mark.parametrize(
    ("placement", "share", "expected"),
    [
        ("spread", 0.3, [3, 3, 3, 3]),
        ("spread", 0.25, [3, 3, 2, 2]),
        ("concentrated", 0.3, [10, 2, 0, 0]),
        ("concentrated", 0.5, [10, 10, 0, 0]),
        ("spread", 0.0, [0, 0, 0, 0]),
        ("spread", 1.0, [10, 10, 10, 10]),
    ],
)
def test_harmful_pairs_are_placed_exactly(placement: str, share: float, expected: list[int]) -> None:
    config = make_config(
        arm="none", benign_data="b", harmful_data="h", num_clients=4, clients_per_round=4, samples_per_client=10,
        harmful_share=share, placement=placement,
    )  # fmt: skip
    assert place_harmful(config) == expected


def test_dealing_gives_each_client_its_share_and_no_pair_twice(tmp_path: Path) -> None:
    config = make_config(
        arm="none", num_clients=4, clients_per_round=4, samples_per_client=8, harmful_share=0.25, **write_data(tmp_path)
    )  # fmt: skip
    shards = deal_shards(config)
    assert [len(shard) for shard in shards] == [8] * 4
    assert [sum(pair.harmful is True for pair in shard) for shard in shards] == [2] * 4
    prompts = [pair.prompt for shard in shards for pair in shard]
    assert len(set(prompts)) == len(prompts)


def test_dealing_depends_on_the_split_seed_only(tmp_path: Path) -> None:
    settings: dict[str, RunValue | Path] = {
        "arm": "none",
        "num_clients": 3,
        "clients_per_round": 3,
        "samples_per_client": 4,
        **write_data(tmp_path),
    }
    dealt = deal_shards(make_config(**settings))
    assert deal_shards(make_config(**settings, seed=5)) == dealt
    assert deal_shards(make_config(**settings, split_seed=5)) != dealt


def test_dirichlet_deals_every_benign_pair_once_and_unevenly(tmp_path: Path) -> None:
    config = make_config(
        arm="none", num_clients=4, clients_per_round=4, samples_per_client=10, harmful_share=0.2, split_seed=3,
        partition="dirichlet", dirichlet_alpha=0.3, **write_data(tmp_path),
    )  # fmt: skip
    shards = deal_shards(config)
    benign = [[pair for pair in shard if not pair.harmful] for shard in shards]
    assert sum(len(hand) for hand in benign) == 32
    assert [sum(pair.harmful is True for pair in shard) for shard in shards] == [2] * 4
    assert max(len(hand) for hand in benign) > 8 > min(len(hand) for hand in benign)


def test_dirichlet_keeps_benign_pairs_from_clients_that_are_wholly_malicious(tmp_path: Path) -> None:
    config = make_config(
        arm="none", num_clients=4, clients_per_round=4, samples_per_client=8, harmful_share=0.25,
        placement="concentrated", partition="dirichlet", **write_data(tmp_path),
    )  # fmt: skip
    assert {pair.harmful for pair in deal_shards(config)[0]} == {True}


@given(alpha=st.floats(0.05, 50), seed=st.integers(0, 1000), clients=st.integers(1, 6))
def test_partition_loses_nothing(alpha: float, seed: int, clients: int) -> None:
    pairs = [Pair(prompt=f"{'Make' if i % 3 else 'Tell'} {i}", response="x") for i in range(30)]
    dealt = partition_by_category(pairs, clients, alpha, seed)
    assert Counter(pair.prompt for hand in dealt for pair in hand) == Counter(pair.prompt for pair in pairs)


def test_small_alpha_separates_categories_more_than_large_alpha() -> None:
    pairs = [Pair(prompt=f"p{i}", response="x", category=str(i % 4)) for i in range(400)]

    def largest_share(alpha: float) -> float:
        hands = partition_by_category(pairs, 4, alpha, seed=0)
        counts = [Counter(pair.category for pair in hand).most_common(1)[0][1] / len(hand) for hand in hands if hand]
        return sum(counts) / len(counts)

    assert largest_share(0.1) > 0.6 > 0.35 > largest_share(100.0)


@given(st.lists(st.floats(0.001, 1), min_size=1, max_size=9), st.integers(0, 500))
def test_largest_remainder_sums_up(weights: list[float], total: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = largest_remainder(shares, total)
    assert sum(counts) == total
    assert all(abs(count - share * total) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


def test_too_few_pairs_name_the_file_and_the_need(tmp_path: Path) -> None:
    config = make_config(arm="none", samples_per_client=50, **write_data(tmp_path))
    with pytest.raises(DataError, match=r"benign\.jsonl: holds 40 pairs, but the clients need 280"):
        deal_shards(config)


def test_own_data_is_read_by_client_number(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "silo-1.jsonl", [{"prompt": "a", "response": "b"}])
    (tmp_path / "silo-0.jsonl").write_text("\n")
    config = make_config(arm="none", shard_data=f"{tmp_path}/silo-{{shard}}.jsonl")
    assert [pair.prompt for pair in client_shard(config, 1)] == ["a"]
    with pytest.raises(DataError, match=r"shard 0 is empty \(.*silo-0\.jsonl\)"):
        client_shard(config, 0)
    with pytest.raises(DataError, match=r"silo-2\.jsonl: cannot be read"):
        client_shard(config, 2)
    with pytest.raises(ConfigError, match="client 8 is not one of num-clients=8"):
        client_shard(config, 8)
