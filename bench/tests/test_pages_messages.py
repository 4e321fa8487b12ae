"""Messages that pages quote are in the code."""

import ast
import re
from functools import cache

import pytest

from bench.tests import pages

OF_VLLM = (
    "Recovered from KV load failure",
    "Failing 1 request(s) due to KV load failure",
    "Turning off hybrid kv cache manager because",
    "KV Transfer metrics:",
)
"""What vLLM itself says."""
LEVELS = re.compile(r"^(ConfigError|KvtideError|INFO|WARNING|ERROR)\b:?")
RUST_TEXT = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
VARIES = re.compile(r"\{[^{}]*\}|%[-.\d]*[sdrf]|%%")
"""What a format string fills in."""
LEAST = 2
"""Spaces that a piece must have: pairs of words would explain everything."""


def pieces(text: str) -> list[str]:
    """The fixed parts of a format string."""
    return [" ".join(part.split()) for part in VARIES.split(text)]


@cache
def fixed_parts() -> tuple[str, ...]:
    """Of everything that the code may say, longest first."""
    found: set[str] = set()
    for source in pages.sources("python/kvtide/*.py").values():
        tree = ast.parse(source)
        # Docstrings, which are shown to nobody.
        documentation = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node not in documentation:
                found.update(pieces(str(node.value)))
    crates = ("connector", "engine", "engine/model", "engine/server", "kernels")
    engine = (f"{crate}/src/**/*.rs" for crate in (*crates, "transport/segment"))
    rust = pages.text_of(*engine, *pages.CONTROL)
    # Neither comments nor a quote as a character begin a text.
    rust = re.sub(r"^\s*//.*|'\"'", "", rust, flags=re.MULTILINE)
    for text in RUST_TEXT.findall(rust):
        found.update(pieces(re.sub(r"\\\n\s*", "", text).replace('\\"', '"')))
    return tuple(
        sorted((part for part in found if part.count(" ") >= LEAST), key=len, reverse=True)
    )


def left_of(message: str) -> str:
    """What no format string of the code explains."""
    left = " ".join(LEVELS.sub("", message.strip()).split())
    if any(left in part for part in fixed_parts()):
        return ""
    for part in fixed_parts():
        if part in left:
            left = left.replace(part, " … ")
    return left


def unexplained(message: str) -> list[str]:
    """Runs of three words and more that the code never says in this order."""
    return re.findall(r"\b[a-z']+(?: [a-z']+){2,}", left_of(message))


def quoted() -> list[str]:
    """Messages of the pages, one a line."""
    found = [
        line
        for name in ("docs/failure-modes.md", "README.md")
        for language, text in pages.page(name).blocks
        if language == "text"
        for line in text.splitlines()
        if LEVELS.match(line)
    ]
    failure_modes = pages.page("docs/failure-modes.md")
    for head in ("Message (`ConfigError`)", "Message", "Message of the protocol"):
        for row in failure_modes.table(head):
            found += re.findall(r"`([^`]+ [^`]+ [^`]+)`", row[0])
    serve = pages.page("docs/serve.md")
    for head in ("Message", "Message at an engine's start", "Message of an engine that runs"):
        for row in serve.table(head):
            found += re.findall(r"`([^`]+ [^`]+ [^`]+)`", row[0])
    for row in pages.page("docs/batch.md").table("The log says"):
        found += re.findall(r"`([^`]+)`", row[0])
    return [line for line in found if not any(words in line for words in OF_VLLM)]


def test_there_are_messages_of_every_kind() -> None:
    assert len(quoted()) > 40


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_in_the_code(message: str) -> None:
    assert not unexplained(message), left_of(message)


def test_a_message_that_nothing_says_is_noticed() -> None:
    assert unexplained("ConfigError: tenant: 7 is not a colour that anybody likes; paint it blue")


def with_words(errors: list[str]) -> list[str]:
    """Those of which a page can be searched for a part."""
    return [text for text in errors if any(part.count(" ") >= LEAST for part in pieces(text))]


def rust_errors(*folders: str) -> list[str]:
    """Format strings of the errors in folders."""
    rust = pages.text_of(*(f"{folder}/**/*.rs" for folder in folders))
    found = re.findall(r'#\[error\(\s*"((?:[^"\\]|\\.)*)"', rust, re.DOTALL)
    return [re.sub(r"\\\n\s*", "", text).replace('\\"', '"') for text in found]


def engine_errors() -> list[str]:
    """Format strings of the errors that reach a user of the engine."""
    found = []
    for source in pages.sources("python/kvtide/*.py").values():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("Error"):
                text = node.args[0] if node.args else None
                parts = text.values if isinstance(text, ast.JoinedStr) else [text]
                fixed = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
                found.append("".join(map(str, fixed)))
    crates = ("connector", "engine", "engine/model", "kernels", "transport/*")
    found += rust_errors(*(f"{crate}/src" for crate in crates))
    return with_words([text for text in found if text not in rust_errors("engine/src/node")])


def daemon_errors() -> list[str]:
    """Format strings of the errors that reach who runs the daemon."""
    return with_words(rust_errors("engine/server/src", "engine/src/node"))


def is_explained(error: str, name: str) -> bool:
    """Whether a page has a part of it."""
    page = " ".join(pages.page(name).text.split())
    known = [part.strip(" ,;:.") for part in pieces(error) if part.count(" ") >= LEAST]
    return any(part in page for part in known)


@pytest.mark.parametrize("error", engine_errors())
def test_an_error_has_an_entry_in_failure_modes(error: str) -> None:
    assert is_explained(error, "docs/failure-modes.md")


@pytest.mark.parametrize("error", daemon_errors())
def test_an_error_of_the_daemon_has_an_entry_in_its_page(error: str) -> None:
    assert is_explained(error, "docs/serve.md")
