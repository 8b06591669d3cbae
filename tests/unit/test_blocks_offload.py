"""Policies exported for vLLM's KV offloading: the same hits as the kernels, on the same stream."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.blocks import REFERENCE, imported

import kvtrace.cli
from kvtrace.errors import InputError
from kvtrace_viewer.blocks import POLICIES, BlockStream, parse_block_policy
from kvtrace_viewer.blocks.offload import EXPORTS, export_vllm, interface
from kvtrace_viewer.blocks.testing import chains


@dataclass
class Block:
    """vLLM's BlockStatus, as far as a policy sees it."""

    ref_cnt: int = 0


def exported(name: str, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """The class of the exported text, with vLLM's module replaced by the interface it names."""
    parts = ["vllm", "v1", "kv_offload", "cpu", "policies", "base"]
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, ".".join(parts), interface)
    space: dict[str, Any] = {"__name__": "exported"}
    text = export_vllm(parse_block_policy(name))
    assert "import kvtrace" not in text
    assert "from kvtrace" not in text
    exec(compile(text, name, "exec"), space)  # noqa: S102
    found: type[Any] = space[EXPORTS[name]]
    assert issubclass(found, interface.CachePolicy)
    return found


def run(policy: Any, stream: BlockStream, capacity: int) -> list[bool]:
    """Use a policy as vLLM's offloading manager does, an access at a time."""
    found, held = [], 0
    for block in stream.blocks.tolist():
        found.append(policy.get(block) is not None)
        if found[-1]:
            policy.touch([block])
            continue
        if held == capacity:
            ((_, status),) = policy.evict(1, {block})
            assert status.ref_cnt == 0
        else:
            held += 1
        policy.insert(block, Block())
    return found


@pytest.mark.parametrize("name", EXPORTS)
def test_the_exported_module_hits_what_the_kernel_hits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = exported(name, monkeypatch)
    for seed in (0, 1, 2):
        stream = chains(seed)
        for capacity in (1, 3, 20, 100):
            expected = POLICIES[name]().run(stream, capacity).hits.astype(bool).tolist()
            assert run(kind(capacity), stream, capacity) == expected, capacity


@pytest.mark.parametrize("name", EXPORTS)
def test_blocks_in_use_and_protected_ones_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = exported(name, monkeypatch)(6)
    blocks = {key: Block() for key in "abcdef"}
    for key, block in blocks.items():
        policy.insert(key, block)
    policy.touch(["a", "nothing"], None)
    blocks["b"].ref_cnt, blocks["c"].ref_cnt = 1, -1
    assert policy.evict(4, {"d"}) is None
    gone = policy.evict(2, {"d"})
    assert len(gone) == 2
    assert {key for key, _ in gone} <= {"a", "e", "f"}
    assert all(blocks[key] is block for key, block in gone)
    blocks["b"].ref_cnt = 0
    left = set(blocks) - {key for key, _ in gone}
    assert {key for key in blocks if policy.get(key) is not None} == left
    policy.remove("d")
    assert policy.get("d") is None
    assert len(policy.evict(2, set())) == 2
    policy.clear()
    assert not any(policy.get(key) for key in blocks)
    policy.insert("a", Block())
    assert policy.evict(1, set())[0][0] == "a"


def test_the_verb_writes_the_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(REFERENCE / "sessions_a.jsonl", tmp_path)
    words = ["blocks", str(tmp_path / "a.kvtrace"), "--capacity", "9", "--policy", "sieve"]
    out = tmp_path / "policy.py"
    assert kvtrace.cli.main([*words, "--export-vllm", str(out)]) == 0
    assert "class SievePolicy(OrderedPolicy)" in out.read_text()
    assert kvtrace.cli.main([*words, "--policy", "lru", "--export-vllm", str(out)]) == 1
    assert "2 were given" in capsys.readouterr().err
    for name in ("arc", "s3fifo:small=0.3"):
        with pytest.raises(InputError, match="has no form for vLLM's offloading"):
            export_vllm(parse_block_policy(name))
