"""What kvtrace blocks found is asked by SQL afterwards."""

from __future__ import annotations

from pathlib import Path

import kvtrace
import kvtrace.cli

LINES = "".join(
    f'{{"timestamp": {i}, "input_length": 1024, "output_length": 1, "hash_ids": [0, {i % 3}]}}\n'
    for i in range(9)
)


def test_results_are_kept_and_asked_again_take_their_own_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES, encoding="utf-8")
    out = str(tmp_path / "a.kvtrace")
    assert kvtrace.cli.main(["import", "mooncake", str(tmp_path / "a.jsonl"), "--out", out]) == 0
    asked = ["blocks", out, "--policy", "lru", "--policy", "fifo", "--capacity", "4"]
    assert kvtrace.cli.main(asked) == 0
    assert kvtrace.cli.main(asked) == 0
    assert kvtrace.cli.main([*asked, "--hits", "prefix"]) == 0
    rows = kvtrace.open(out).sql("select * from block_runs where policy = 'lru'").to_pylist()
    assert len(rows) == 2
    assert len({row["block_run"] for row in rows}) == 2
    # Three distinct blocks fit: each misses once; and one hit stands behind a miss.
    assert {row["accesses"] for row in rows} == {18}
    assert {row["hits"] for row in rows} == {14, 15}
