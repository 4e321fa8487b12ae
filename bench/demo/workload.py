"""The chat traffic: conversations that share long system prompts. Pure and deterministic.

A few shops each have a handbook (the system prompt) and several customers who write to them. The
customers of one shop follow each other, so stock vLLM's own prefix cache finds the handbook while
it is warm. All customers write once per turn, in the same order, so by the time a conversation
goes on, the others have pushed its history out of a small KV cache. That is the case an offload
tier is for, and a common one: people type more slowly than a busy server recycles its cache.

Sizes are in entries and letters here; at the defaults a handbook is about 1,000 tokens and each
turn adds about 100 besides the answer.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SHOPS = ("Alder & Finch", "Brightwater", "Castle Row", "Dunmore", "Eastgate", "Fernhill", "Grove")
GOODS = ("lamp", "kettle", "rucksack", "clock", "blanket", "bicycle", "radio", "armchair", "tent")
STYLES = ("Harbour", "Meadow", "Granite", "Orchard", "Lantern", "Juniper", "Copper", "Willow")
TOWNS = ("Lisbon", "Bergen", "Turin", "Ghent", "Porto", "Leeds", "Graz", "Malmo", "Nantes")
TROUBLES = (
    "arrived with a scratch along one side",
    "has not arrived although the tracking page says it was delivered",
    "stopped working after the second evening",
    "is a different colour from the one in the photograph",
    "came without the screws that the manual mentions",
)
MOODS = (
    "I have been a customer for six years and would like to stay one.",
    "It is a birthday present, so I would be glad of an answer before Friday.",
    "My neighbour bought the same one in spring and is very happy with it.",
    "I have kept the box and the receipt, and can send photographs of both.",
)
QUESTIONS = (
    "What do you suggest that I do first, and what will it cost me?",
    "Please tell me step by step how an exchange works and how long it takes.",
    "Which other article in your handbook would suit me better, and why?",
    "Please write the reply that I can forward to my insurer.",
    "Could you summarise what we have agreed so far in a few sentences?",
)


@dataclass(frozen=True)
class Conversation:
    """One customer's side of a chat; the answers come from the model."""

    number: int
    system: str
    user_turns: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One request: turn `turn` (from 0) of conversation `conversation`."""

    conversation: int
    turn: int


def handbook(shop: str, entries: int, rng: random.Random) -> str:
    """A shop's system prompt: house rules and `entries` articles, about 27 tokens each."""
    lines = [
        f"You answer letters for {shop}, a mail-order shop. Be friendly and concrete. Use the "
        "handbook below, and say so when it does not cover a question.",
    ]
    for number in range(1, entries + 1):
        name = f"{rng.choice(STYLES)} {rng.choice(GOODS)}"
        lines.append(
            f"{number}. The {name} costs {rng.randint(12, 480)} euros, ships from "
            f"{rng.choice(TOWNS)} and has a guarantee of {rng.randint(1, 5)} years."
        )
    return "\n".join(lines)


def letter(turn: int, rng: random.Random) -> str:
    """What a customer writes in one turn."""
    article = f"{rng.choice(STYLES)} {rng.choice(GOODS)}"
    opening = "Good morning" if turn == 0 else "Thank you for the quick answer"
    return (
        f"{opening}. I am writing about order {rng.randint(10000, 99999)}, the {article} that you "
        f"sent to {rng.choice(TOWNS)} {rng.randint(2, 20)} days ago. It {rng.choice(TROUBLES)}. "
        f"{rng.choice(MOODS)} {rng.choice(QUESTIONS)}"
    )


def conversations(
    count: int, turns: int, shops: int, entries: int, seed: int = 1
) -> list[Conversation]:
    """`count` conversations of `turns` turns over `shops` system prompts."""
    if min(count, turns, shops, entries) < 1:
        raise ValueError("conversations, turns, shops and handbook entries must all be at least 1")
    # A seed per text, so that changing one knob leaves the other texts as they were.
    books = [
        handbook(
            f"{SHOPS[shop % len(SHOPS)]} {shop + 1}", entries, random.Random(f"{seed}/book/{shop}")
        )
        for shop in range(shops)
    ]
    made = []
    for number in range(count):
        rng = random.Random(f"{seed}/customer/{number}")
        letters = tuple(letter(turn, rng) for turn in range(turns))
        made.append(Conversation(number, books[number * shops // count], letters))
    return made


def schedule(count: int, turns: int) -> Iterator[Step]:
    """Everyone's first turn, then everyone's second: the order requests are sent in."""
    for turn in range(turns):
        for conversation in range(count):
            yield Step(conversation, turn)
