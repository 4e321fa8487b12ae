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


def default_of(field: str, source: str) -> str:
    """What `defaults` of the pool's or the engine's part gives a field, as the README writes it."""
    defaults = "".join(re.findall(r"fn defaults\(.*?\n    }\n", source, re.DOTALL))
    found = re.search(rf"\b{field}: ([^\n]+),\n", defaults)
    assert found, field
    value = found[1]
    if seconds := re.fullmatch(r"Duration::from_secs\((\d+)\)", value):
        return str(int(seconds[1]) * 1000)
    if shifted := re.match(r"\(?(\d+) << [23]0", value):
        return shifted[1]
    if path := re.fullmatch(r'PathBuf::from\(("[^"]*")\)', value):
        return path[1]
    if value == "CudaOptions::default()":
        return '"auto"'
    if choice := re.search(rf'(?:\(("\w+"), {value}\)|("\w+") => {value},)', source):
        return choice[1] or choice[2]
    return {"None": "none"}.get(value, value)


def test_the_row_of_a_setting_names_its_default() -> None:
    source = pages.text_of("engine/src/**/*.rs")
    fields = dict(re.findall(r'key: "(\w+)",.*?config\.\w+\.(\w+)[\w.]* =', source, re.DOTALL))
    assert set(fields) >= set(settings())
    given = {key: default_of(fields[key], source) for key in settings()}
    stated = {key: documented()[key][1].replace("`", "") for key in settings()}
    stated["host_capacity_gb"] = stated["host_capacity_gb"].split(",")[0]
    stated["weights_revision"] = stated["weights_revision"].replace(
        "the commit that was loaded from a hub, or names, sizes and times of the weight files in a "
        "folder",
        "none",
    )
    assert stated == given


def test_the_variables_of_aibrix_are_documented() -> None:
    source = pages.text_of("engine/src/**/*.rs")
    known = set(re.findall(r'(?:name: |aliases: &\[)"(AIBRIX_\w+)"', source))
    assert known == set(re.findall(r"`(AIBRIX_\w+)`", README.text))
