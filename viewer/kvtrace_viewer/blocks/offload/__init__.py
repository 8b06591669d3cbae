"""Policies in the form that vLLM's KV offloading takes: `CachePolicy`, by module path.

Each file here is written out as it stands by `kvtrace blocks ... --export-vllm FILE`, with its
import of `CachePolicy` turned to vLLM's.
"""

from __future__ import annotations

from importlib.resources import files

from kvtrace.errors import InputError
from kvtrace_viewer.blocks.policy import BlockPolicy

#: Policies that can be exported, and the class that the file defines.
EXPORTS = {
    "lru": "LRUPolicy",
    "fifo": "FIFOPolicy",
    "clock": "ClockPolicy",
    "lfu": "LFUPolicy",
    "sieve": "SievePolicy",
    "s3fifo": "S3FIFOPolicy",
}
_VLLM = "from vllm.v1.kv_offload.cpu.policies.base import CachePolicy"


def export_vllm(policy: BlockPolicy) -> str:
    """Text of a Python module with the policy as vLLM's `CachePolicy`.

    Put it where vLLM's process can import it, and name class and module in the offloading
    connector's `kv_connector_extra_config`: the text's head says how.

    Raises
    ------
    InputError
        For a policy without such a form, or with parameters other than its defaults.
    """
    kind = EXPORTS.get(policy.name)
    if kind is None or policy.spec != policy.name:
        raise InputError(
            f"{policy.spec} has no form for vLLM's offloading; one of {', '.join(EXPORTS)}, with"
            " its defaults, was expected; choose another --policy"
        )
    own, shared = _source(policy.name), _source("ordered")
    # One file, so that a user has one to copy: the base class goes where it was imported.
    imports = sorted({line for line in _imports(own) | _imports(shared) if _is_kept(line)})
    head = (
        own.partition("\n\n")[0],
        f"# Made by kvtrace. In vLLM's kv_connector_extra_config name this module as\n"
        f"# cache_policy_module_path and {kind} as the eviction policy; its API is experimental.",
        "from __future__ import annotations",
        "\n".join(imports),
        _VLLM,
    )
    return "\n\n".join(head) + f"\n\n\n{_body(shared)}\n\n\n{_body(own)}\n"


def _source(name: str) -> str:
    return files(__package__).joinpath(f"{name}.py").read_text(encoding="utf-8")


def _body(text: str) -> str:
    """A module's text behind its imports."""
    return text.partition("\n\n\n")[2].rstrip()


def _imports(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith(("import ", "from "))}


def _is_kept(line: str) -> bool:
    return "kvtrace_viewer" not in line and "__future__" not in line
