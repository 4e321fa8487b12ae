"""Runs a program until it has parsed its command line, and no further.

`parse_only.py PROGRAM ARGUMENT…`, where PROGRAM is a module or a file. Ends with 0 if the arguments
are right; argparse says what is wrong otherwise. What a program imports and this environment lacks
(vLLM, torch) is not needed for that, and empty.
"""

import argparse
import importlib.abc
import importlib.machinery
import runpy
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

LACKING = ("cuda", "kvtide", "torch", "vllm")


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not here."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in LACKING:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return MagicMock(spec=None, __path__=[], __spec__=spec)

    def exec_module(self, module: ModuleType) -> None:
        pass


def main() -> None:
    """See the module's documentation."""
    program = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.meta_path.append(Empty())
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(parser: argparse.ArgumentParser, *arguments: Any, **more: Any) -> None:
        parse(parser, *arguments, **more)
        sys.exit(0)

    argparse.ArgumentParser.parse_args = parse_and_end  # type: ignore[method-assign]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    sys.exit("the program ended without having parsed anything")


if __name__ == "__main__":
    main()
