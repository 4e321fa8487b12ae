"""A PostgreSQL of the tests' own: Debian's package, found or unpacked into the cache."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rig import PATIENCE_S, die_with_parent, end, free_port, wait_until
from tls import Certificates

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "python" / "env"))

from provision import cache_root, exclusive

FOLDERS = "usr/lib/postgresql/*/bin"
DONE = ".kvtide-complete"


def packages() -> set[str]:
    """Debian's packages of the server, and what this machine lacks of what they need."""

    def ask(*command: str) -> list[str]:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split(
            "\n"
        )

    depends = [
        text.split(":")[1].strip() for text in ask("apt-cache", "depends", "postgresql")[1:2]
    ]
    server = depends[0]
    lacking = ask(
        *("apt-get", "-o", "Debug::NoLocking=1", "--print-uris", "-qq"),
        *("--no-install-recommends", "install", server),
    )
    names = {text.split()[1].split("_")[0] for text in lacking if text.startswith("'")}
    return names | {server, server.replace("postgresql-", "postgresql-client-"), "libpq5"}


def unpack(target: Path) -> None:
    """Downloads and unpacks; nothing is installed, so anybody may do it."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    subprocess.run(["apt-get", "download", *sorted(packages())], cwd=target, check=True)
    for archive in target.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
        archive.unlink()
    (target / DONE).touch()


def binaries() -> Path:
    """The folder of `initdb` and `postgres`."""
    installed = sorted(Path("/").glob(f"{FOLDERS}/postgres"))
    if installed:
        return installed[-1].parent
    unpacked = cache_root() / "postgresql"
    with exclusive(unpacked.with_suffix(".lock")):
        if not (unpacked / DONE).exists():
            unpack(unpacked)
    return next(unpacked.glob(FOLDERS))


def owner() -> dict[str, object]:
    """PostgreSQL refuses to run as root; then somebody else has to own it."""
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def tls_settings(data: Path, certificates: Certificates, who: dict[str, object]) -> list[str]:
    """Puts the certificate where its owner can read it, and lets nobody in without TLS."""
    settings = ["-c", "ssl=on"]
    for option, source in (
        ("ssl_cert_file", certificates.certificate),
        ("ssl_key_file", certificates.key),
    ):
        target = data / source.name
        shutil.copy(source, target)
        target.chmod(0o600)
        if who:
            shutil.chown(target, "nobody")
        settings += ["-c", f"{option}={target}"]
    (data / "pg_hba.conf").write_text("hostssl all all 127.0.0.1/32 trust\n")
    return settings


def psql(url: str, statements: str) -> str:
    """What the statements give, without ornaments; they end at the first that fails."""
    programs = binaries()
    command = [programs / "psql", url, "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"]
    done = subprocess.run(
        command,
        input=statements,
        env=environment_of(programs),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment_of(programs: Path) -> dict[str, str]:
    """Where the libraries lie that were unpacked with the programs."""
    libraries = programs.parents[3] / "lib" / os.uname().machine
    return {**os.environ, "LC_ALL": "C", "LD_LIBRARY_PATH": f"{libraries}-linux-gnu"}


@contextlib.contextmanager
def postgres(directory: Path, certificates: Certificates | None = None) -> Iterator[str]:
    """A running database; gives its URL. With certificates, it takes TLS connections only."""
    programs = binaries()
    environment = environment_of(programs)
    data = directory / "postgres"
    data.mkdir()
    who = owner()
    if who:
        # The test's own directories are closed to others.
        for parent in [data, *data.parents]:
            if parent.owner() == "root" and parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o011)
        shutil.chown(data, "nobody")
    options = ["--auth", "trust", "--username", "kvtide", "--encoding", "UTF8", "--no-sync"]
    subprocess.run(
        [programs / "initdb", "-D", data, *options],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        cwd="/",
        **who,  # type: ignore[call-overload]
    )
    port = free_port()
    settings = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={data}"]
    if certificates:
        settings += tls_settings(data, certificates, who)
    with (directory / "postgres.log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "postgres", "-D", data, "-p", str(port), *settings],
            env=environment,
            stdout=log,
            stderr=log,
            cwd="/",
            preexec_fn=die_with_parent,
            **who,  # type: ignore[call-overload]
        )
    ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
    try:
        wait_until(
            "PostgreSQL",
            lambda: subprocess.run(ready, check=False, env=environment).returncode == 0,
        )
        yield f"postgresql://kvtide@127.0.0.1:{port}/postgres"
    finally:
        # Killed outright, it would leave its shared memory behind.
        process.send_signal(signal.SIGQUIT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE_S)
        end(process)
