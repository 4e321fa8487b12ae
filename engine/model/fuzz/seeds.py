"""Writes the recorded frames as files, which libFuzzer begins with: `seeds.py FOLDER`."""

import sys
from pathlib import Path

RECORDED = Path(__file__).parents[1] / "tests" / "wire" / "frames.txt"


def frames() -> dict[str, bytes]:
    """Name of its kind → a frame."""
    found: dict[str, bytes] = {}
    name = ""
    for line in RECORDED.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            _, *digits = line.partition(";")[0].split()
            found[name] += bytes.fromhex("".join(digits))
        elif line and not line.startswith("#"):
            name = line
            found[name] = b""
    return found


def main() -> None:
    """A file for each frame, and for the stream that is all of them in pieces of seven bytes."""
    folder = Path(sys.argv[1])
    for name, each in frames().items():
        for target, before in (("wire_frame", b""), ("wire_stream", b"\x07")):
            (folder / target / "seeds").mkdir(parents=True, exist_ok=True)
            (folder / target / "seeds" / name).write_bytes(before + each)
    stream = b"\x07" + b"".join(frames().values())
    (folder / "wire_stream" / "seeds" / "all").write_bytes(stream)


if __name__ == "__main__":
    main()
