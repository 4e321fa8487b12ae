"""moto's server in the place of S3."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import httpx
from rig import die_with_parent, end, free_port, wait_until

BUCKET = "batches"


def bucket(environment: dict[str, str]) -> object:
    return boto3.resource(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT"],
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    ).Bucket(BUCKET)


@contextlib.contextmanager
def object_store(directory: Path) -> Iterator[dict[str, str]]:
    """The environment that leads to an empty bucket."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with (directory / "moto.log").open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            preexec_fn=die_with_parent,
        )
    environment = {
        "AWS_ENDPOINT": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }

    def answers() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{url}/moto-api/").status_code < 500
        return False

    try:
        wait_until("moto", answers)
        bucket(environment).create()
        yield environment
    finally:
        end(process)
