"""Uploads and input files that are damaged at random: always an answer, never a server error."""

from __future__ import annotations

import os
import random

import httpx
from openai import OpenAI
from openai.types import Batch
from rig import Server, ended, jsonl, line, submit

CASES = int(os.environ.get("KVTIDE_BATCH_FUZZ", "400"))
SEED = int(os.environ.get("KVTIDE_BATCH_FUZZ_SEED", "5"))
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--b\r\nContent-Disposition: form-data; name="expires_after[anchor]"\r\n\r\ncreated_at\r\n'
    b'--b\r\nContent-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n3600\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="in.jsonl"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\nsome bytes\r\n--b--\r\n"
)
SPICE = [b"\r\n", b"--b", b"--b--", b'"', b"\x00", b"\xff", b"name=", b":", b";", b"", b"\r", b"{"]


def damaged(chance: random.Random, content: bytes) -> bytes:
    """`content` with up to three cuts, each with something else in its place."""
    for _ in range(chance.randint(1, 3)):
        begin = chance.randrange(len(content) + 1)
        end = min(len(content), begin + chance.choice([0, 1, 5, 40]))
        content = content[:begin] + chance.choice(SPICE) + content[end:]
    return content


def test_damaged_uploads_are_answered(shared: Server) -> None:
    chance = random.Random(SEED)
    seen = set()
    with httpx.Client() as client:
        for _ in range(CASES):
            body = damaged(chance, FORM)
            boundary = chance.choice(["b", "b", "b", "c", '"b"', ""])
            kind = f"multipart/form-data; boundary={boundary}"
            answer = client.post(
                f"{shared.url}/v1/files", content=body, headers={"content-type": kind}
            )
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 413), body
            if answer.status_code != 200:
                assert answer.json()["error"]["message"]
    assert seen >= {200, 400}
    assert shared.is_ready()


def status_of_damaged(client: OpenAI, batch: Batch) -> str:
    """How it has ended; where it was refused, every fault is named."""
    batch = ended(client, batch)
    if batch.status == "failed":
        assert batch.errors is not None
        assert batch.errors.data
        for error in batch.errors.data:
            assert error.code
            assert error.line or error.code == "empty_file"
    return batch.status


def test_damaged_input_files_end_in_results_or_in_named_errors(shared: Server) -> None:
    chance = random.Random(SEED + 1)
    client = shared.client()
    good = jsonl([line(str(n), f"content {n}") for n in range(5)])
    statuses = set()
    # So many at a time: a tenant has not places for all.
    for _ in range(max(1, CASES // 400)):
        batches = [submit(client, damaged(chance, good)) for _ in range(60)]
        statuses |= {status_of_damaged(client, batch) for batch in batches}
    assert statuses == {"completed", "failed"}
