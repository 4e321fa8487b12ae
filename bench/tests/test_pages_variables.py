"""Environment variables: what pages name is read, and what is read is named."""

import re

from bench.tests import pages
from bench.tests.pages import PAGES

ASKED_FOR = re.compile(
    r'(?:env::var(?:_os)?\(|\benv = |environ(?:\.get\(|\[)|getenv\()"([A-Z][A-Z_]{3,})"(?!\] =)'
)
"""How Rust, clap and Python name a variable that they read."""
BATCH = pages.page("docs/batch.md")
IN_A_CONSTANT = re.compile(r': &str = "(KVTIDE_[A-Z_]+)"')
IN_SHELL = re.compile(r"\b(KVTIDE_[A-Z_]+)\b")
CODE = ("bench", "connector", "control", "engine", "kernels", "python", "transport")
OF_THE_SYSTEM = {"PATH", "HOME", "CARGO_MANIFEST_DIR", "OUT_DIR"}
"""Set by the system, or by cargo."""
OF_A_TEST = {"SEGMENT_TEST_DIRECTORY", "TRITON_INTERPRET"}
"""Set by a test for the processes that it starts."""
EXAMPLES = {"KVTIDE_EVICTON", "KVTIDE_SERVICE_HOST"}
"""Named by pages because they are no settings."""


def read() -> set[str]:
    """Variables that any of our code reads."""
    code = pages.text_of(
        "build.rs", *(f"{top}/**/*.{kind}" for top in CODE for kind in ("rs", "py"))
    )
    found = set(ASKED_FOR.findall(code)) | set(IN_A_CONSTANT.findall(code))
    shell = pages.text_of("Makefile", ".ci/run", "control/tests/**/*.sh")
    found |= set(IN_SHELL.findall(shell)) | own_of_settings()
    return {name for name in found - OF_THE_SYSTEM - OF_A_TEST if not name.endswith("_")}


def own_of_settings() -> set[str]:
    """`KVTIDE_<KEY>` of every setting of the engine, `KVTIDE_SERVE_…` of the daemon's."""
    keys = re.findall(r'Setting \{\s*key: "(\w+)"', pages.text_of("engine/src/**/*.rs"))
    of_serve = re.findall(
        r'Setting \{\s*section: "(\w+)",\s*key: "(\w+)"',
        pages.text_of("engine/server/src/**/*.rs"),
    )
    assert of_serve
    keys += [f"SERVE_{section}_{key}" for section, key in of_serve]
    return {f"KVTIDE_{key.upper()}" for key in keys}


def named() -> set[str]:
    """Variables in the code of any page."""
    code = " ".join(text for page in PAGES for text in page.code)
    return set(re.findall(r"(?<!\w)[A-Z][A-Z_]{3,}(?![\w…])", code))


def test_every_variable_that_is_read_is_documented() -> None:
    assert len(read()) > 40
    assert not sorted(read() - named())


def test_every_variable_of_ours_that_is_documented_is_read() -> None:
    ours = {name for name in named() if name.startswith("KVTIDE_") and not name.endswith("_")}
    assert not sorted(ours - read() - EXAMPLES)


def options() -> dict[str, tuple[str, str]]:
    """Option of `kvtide-control` with a variable → its variable, and its default or nothing."""
    source = pages.text_of(*pages.CONTROL)
    attributes = re.findall(r"#\[arg\((.*?)\)\]\n\s*(?:pub )?(\w+):", source, re.DOTALL)
    found = {}
    for attribute, field in attributes:
        variable = re.search(r'env = "(\w+)"', attribute)
        # A hidden one is there for its variable alone.
        if variable and "hide = true" not in attribute:
            default = re.search(r'default_value(?:_t)? = "?([^",)]+)', attribute)
            value = default[1].strip().replace("_", "") if default else ""
            found[f"--{field.replace('_', '-')}"] = (variable[1], value)
    return found


def test_an_option_is_documented_beside_its_variable() -> None:
    assert len(options()) > 30
    lines = [line for page in PAGES for line in page.text.splitlines()]
    assert not [
        (option, variable)
        for option, (variable, _) in options().items()
        if not any(f"`{option}`" in line and f"`{variable}`" in line for line in lines)
    ]


def test_defaults_of_the_batch_server_are_those_of_the_table() -> None:
    table = {row[0].strip("`"): row[2].strip("`") for row in BATCH.table("Option")}
    numbers = {
        option: value for option, (_, value) in options().items() if re.match(r"[\d.]+$", value)
    }
    assert len(numbers) > 10
    assert {option: table[option] for option in numbers} == numbers
