"""The workload is the same on every run and machine, and shares what it should."""

import hashlib

import pytest

from bench.demo.workload import Step, conversations, schedule


def test_same_arguments_give_the_same_texts() -> None:
    assert conversations(8, 4, 4, 20) == conversations(8, 4, 4, 20)


def test_texts_have_not_changed_unnoticed() -> None:
    text = repr(conversations(3, 2, 2, 5)).encode()
    # Reports are only comparable while this holds; update it when a change is meant.
    assert hashlib.sha256(text).hexdigest()[:16] == "a3432a04713c0a24"


def test_seed_changes_the_texts() -> None:
    assert conversations(2, 2, 1, 5, seed=1) != conversations(2, 2, 1, 5, seed=2)


def test_more_turns_extend_a_conversation_without_changing_it() -> None:
    short, long = conversations(2, 2, 2, 5), conversations(2, 4, 2, 5)
    for one, other in zip(short, long, strict=True):
        assert one.system == other.system
        assert other.user_turns[:2] == one.user_turns


def test_neighbours_share_a_system_prompt_and_shops_differ() -> None:
    systems = [one.system for one in conversations(8, 1, 4, 5)]
    assert len(set(systems)) == 4
    assert [systems[i] == systems[i + 1] for i in range(0, 8, 2)] == [True] * 4


def test_different_shops_share_no_long_prefix() -> None:
    first, second = (one.system for one in conversations(2, 1, 2, 20))
    shared = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    # A block is 32 tokens, well over 64 characters: no block may be common.
    assert shared < 64


def test_more_shops_than_names_still_differ() -> None:
    assert len({one.system for one in conversations(20, 1, 20, 2)}) == 20


def test_schedule_goes_round_all_conversations_before_the_next_turn() -> None:
    assert list(schedule(2, 2)) == [Step(0, 0), Step(1, 0), Step(0, 1), Step(1, 1)]


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0)])
def test_empty_workloads_are_refused(sizes: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        conversations(*sizes)
