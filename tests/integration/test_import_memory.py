"""A workload of any length is imported in the same memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import resource, sys
from kvtrace.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


def write_synthetic(path: Path, size: int) -> None:
    """Mooncake-like lines, made up: a prefix of 16 shared blocks and 24 of each request's own."""
    prefix = list(range(16))
    written = number = 0
    with path.open("w") as file:
        while written < size:
            ids = prefix + list(range(10**6 + 24 * number, 10**6 + 24 * (number + 1)))
            line = {
                "timestamp": 10 * number,
                "input_length": 512 * len(ids),
                "output_length": 100,
                "hash_ids": ids,
            }
            written += file.write(json.dumps(line) + "\n")
            number += 1


def peak_of_an_import(source: Path, out: Path) -> int:
    """Bytes of memory that importing took at most."""
    command = [sys.executable, "-c", CODE, "import", "mooncake", str(source), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout.split()[-1]) * unit


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_five_times_the_file_takes_little_more_memory(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (15, 75):
        source = tmp_path / f"synthetic-{megabytes}.jsonl"
        write_synthetic(source, megabytes * 10**6)
        peaks.append(peak_of_an_import(source, tmp_path / f"{megabytes}.kvtrace"))
        source.unlink()
    # Without a limit on the database's memory it grew with the file: 1.2 GiB for 500 MB.
    assert peaks[1] - peaks[0] < 60 * 2**20
