"""Commands that pages tell to run: programs, targets, flags and arguments that exist."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bench.tests import pages
from bench.tests.pages import PAGES, ROOT

PYTHON = re.compile(
    r"(?:python3?|\$VENV/bin/python)\"? (?:-m (bench[\w.]*)|(python/env/\w+\.py))( [^|>)`]*)?$"
)
PARSER = "ArgumentParser("
OTHERS = {
    "AIBrix": "controllers disable-webhook enable-k8s-job",
    "vLLM": "calculate-kv-scales data-parallel-size decode-context-parallel-size "
    "disable-hybrid-kv-cache-manager "
    "enable-dbo enable-sleep-mode kv-cache-dtype kv-offloading-size kv-transfer-config nnodes "
    "pipeline-parallel-size port prefill-context-parallel-size revision runner scheduling-policy "
    "served-model-name shutdown-timeout speculative-config tensor-parallel-size ubatch-size",
    "docker and uv": "entrypoint gpus rm shm-size system ulimit",
    "kubectl": "cascade for replicas server-side type",
    "cargo": "bench document-private-items features locked no-default-features no-deps open path "
    "release test",
    "numactl": "cpunodebind interleave membind",
    "PegaFlow": "addr devices pool-size",
}
"""Flags of other people's programs that pages name."""


def documented_python() -> list[tuple[str, str]]:
    """Program and arguments of every Python command of ours."""
    found = set()
    for page in PAGES:
        for command in page.commands:
            inner = re.sub(r"^\w+=\$\((.*)\)$", r"\1", command)
            if match := PYTHON.search(inner):
                module, file, arguments = match.groups()
                found.add((module or file, (arguments or "").strip()))
    return sorted(found)


def file_of(program: str) -> Path:
    """The file that runs."""
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/"))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def test_pages_name_commands_of_every_kind() -> None:
    programs = {program for program, _ in documented_python()}
    assert {"bench.gpu", "bench.gpu.plots", "python/env/provision.py"} <= programs


@pytest.mark.parametrize(("program", "arguments"), documented_python())
def test_documented_arguments_are_parsed(program: str, arguments: str) -> None:
    assert file_of(program).is_file()
    if PARSER not in file_of(program).read_text():
        assert arguments == "", f"{program} takes no arguments"
        return
    # Placeholders in capitals stand for a text, or for a number.
    given = ["7" if re.fullmatch(r"[A-Z]", word) else word for word in shlex.split(arguments)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "tests" / "parse_only.py"), program, *given],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_arguments_that_are_wrong_are_noticed() -> None:
    script = str(ROOT / "bench" / "tests" / "parse_only.py")
    for wrong in (["bench.gpu.report"], ["bench.gpu", "--out", "DIR", "--no-such-flag"]):
        done = subprocess.run(
            [sys.executable, script, *wrong],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=60,
        )
        assert done.returncode == 2


def targets() -> set[str]:
    """Of the Makefile."""
    return set(re.findall(r"^\.PHONY: ([\w-]+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_that_are_named_exist() -> None:
    named = {
        (str(page), target)
        for page in PAGES
        for command in page.commands
        for target in re.findall(r"^make (?:[A-Z]+=\S+ )*([a-z][\w-]*)", command)
    }
    assert ("README.md", "demo") in named
    assert not {(page, target) for page, target in named if target not in targets()}


def test_make_help_lists_every_described_target_with_what_make_makes_of_it() -> None:
    done = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    described = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[0] for line in done.stdout.splitlines()] == described
    assert "$(" not in done.stdout
    assert "Real vLLM 0.32.0" in done.stdout


def test_every_described_target_is_in_contributing() -> None:
    described = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    said = " ".join(pages.page("docs/contributing.md").code)
    assert not [target for target in described if f"make {target}" not in said]


def crates() -> dict[str, Path]:
    """Name → folder of every crate."""
    manifests = {
        path: tomllib.loads(text)
        for path, text in pages.sources("*/Cargo.toml", "*/*/Cargo.toml").items()
    }
    return {
        manifest["package"]["name"]: path.parent
        for path, manifest in manifests.items()
        if "package" in manifest
    }


def test_crates_and_tests_that_cargo_is_told_to_run_exist() -> None:
    checked = 0
    for page in PAGES:
        for command in page.commands:
            if not command.startswith("cargo ") or not (of := re.search(r" -p ([\w-]+)", command)):
                continue
            folder = crates()[of[1]]
            for kind, inside in (("test", "tests"), ("bench", "benches")):
                for name in re.findall(rf" --{kind} (\w+)", command):
                    assert (folder / inside / f"{name}.rs").is_file(), command
                    checked += 1
    assert checked > 1


def own_flags() -> set[str]:
    """Of `kvtide-control`, of `kvtide`, and of our Python programs."""
    rust = pages.text_of(*pages.CONTROL, "engine/server/src/**/*.rs")
    named = re.findall(r"#\[arg\(\s*long\b(?:[^\]]|\](?!\n))*\]\n\s*(?:pub )?(\w+):", rust)
    parsers = pages.sources("bench/**/*.py", "python/env/*.py").values()
    python = "\n".join(text for text in parsers if PARSER in text)
    return {name.replace("_", "-") for name in named} | set(re.findall(r'"--([\w-]+)"', python))


def named_flags() -> set[str]:
    """In the code of any page."""
    code = " ".join(text for page in PAGES for text in page.code)
    return set(re.findall(r"(?<![\w-])--([a-z][\w-]+)", code))


def test_flags_that_are_named_exist() -> None:
    assert {"latency-tolerance", "webhook-cert-dir", "pool-tokens"} <= own_flags()
    others = {flag for flags in OTHERS.values() for flag in flags.split()}
    assert not sorted(named_flags() - own_flags() - others - {"help"})


def test_the_list_of_others_flags_has_none_that_no_page_names() -> None:
    others = {flag for flags in OTHERS.values() for flag in flags.split()}
    assert not sorted(others - named_flags())
