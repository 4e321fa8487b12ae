"""The README's table of settings is that of the engine."""

import re

from bench.tests import pages
from bench.tests.pages import README

SETTING = re.compile(r'Setting \{\s*key: "(\w+)",.*?expects: ([^,]*(?:"[^\n]*")?),\n', re.DOTALL)


def settings() -> dict[str, str]:
    """Key → what it may be, as the source writes it."""
    source = pages.text_of("engine/src/**/*.rs")
    constants = dict(re.findall(r'const (\w+): &str = ("(?:[^"\\]|\\.)*");', source, re.DOTALL))
    return {key: constants.get(expects, expects) for key, expects in SETTING.findall(source)}


def documented() -> dict[str, list[str]]:
    """Key → cells of its row."""
    return {
        key: row for row in README.table("Key") for key in re.findall(r"`(\w+)`", row[0]) if key
    }


def test_every_setting_has_a_row_and_every_row_a_setting() -> None:
    assert len(settings()) > 10
    assert set(documented()) == set(settings())


def test_the_row_of_a_setting_names_its_variable() -> None:
    assert not [key for key, row in documented().items() if f"`KVTIDE_{key.upper()}`" not in row[2]]


def test_the_row_of_a_setting_names_every_choice() -> None:
    missing = [
        (key, choice)
        for key, expects in settings().items()
        for choice in re.findall(r'\\"([^"\\]+)\\"', expects)
        if choice.split(":")[0].split("/")[-1] not in " ".join(documented()[key][1:])
    ]
    assert not missing


def test_the_variables_of_aibrix_are_documented() -> None:
    source = pages.text_of("engine/src/**/*.rs")
    known = set(re.findall(r'(?:name: |aliases: &\[)"(AIBRIX_\w+)"', source))
    assert known == set(re.findall(r"`(AIBRIX_\w+)`", README.text))
