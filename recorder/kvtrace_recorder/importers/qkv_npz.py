"""q, k and v in an .npz file: `q{l}`, `k{l}`, `v{l}` per layer l from 0, and the token ids.

Arrays: `q{l} [q_head, token, head_dim]`, `k{l}`, `v{l} [kv_head, token, head_dim]`, after rotary
embedding; `ids [token]`; optional `q_prerope{l}` like q{l}, `score{l} [kv_head, token]` (what a
policy scored the tokens, higher = kept), `wo [layer, hidden, q_head * head_dim]` and
`prompt_tokens` (default: all tokens). Causal attention over all earlier tokens at a scale of
1/sqrt(head_dim) is assumed.
"""

from __future__ import annotations

import argparse
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtrace.errors import InputError
from kvtrace.writer import LayerSpec, TraceWriter
from kvtrace_recorder.lse import KeyHistory, row_lse

Array = NDArray[Any]
_KINDS = ("q", "k", "v")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the source."""
    parser.add_argument("source", metavar="FILE", help="the .npz file to read")


def run_import(args: argparse.Namespace, out: Path, command: Sequence[str]) -> None:
    """Make a trace of one request, in the file's own type.

    Raises
    ------
    InputError
        Where the file is no .npz, or an array is missing or of the wrong shape or type.
    TraceError
        Where `out` exists and may not be replaced.
    """
    with _QkvFile(Path(args.source)) as file:
        # Everything is checked before anything is made.
        specs = [file.spec(layer, file.rows(layer)) for layer in range(file.layers)]
        for spec in specs:
            file.scores(spec.layer, spec.num_kv_heads)
        file.check_wo(specs)
        writer = TraceWriter(
            out,
            source="imported",
            command=command,
            dtype=file.dtype,
            extra=file.extra,
            force=args.force,
        )
        with writer:
            _write(writer, file, specs)


class _QkvFile:
    """The file, checked; arrays are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open(path)
        names = set(self._file.files)
        layers = sorted(int(m[1]) for m in (re.fullmatch(r"q(\d+)", name) for name in names) if m)
        if not layers or layers != list(range(len(layers))):
            raise InputError(
                f"{path} has queries of layers {layers}; q0, q1, ... without holes were expected;"
                f" it holds {', '.join(sorted(names)[:12]) or 'nothing'}"
            )
        self.layers = len(layers)
        self.extra = tuple(kind for kind in ("q_prerope", "score") if f"{kind}0" in names)
        self.wo = self._file["wo"] if "wo" in names else None
        self.ids = self._ids()
        first = self.array("q", 0)
        self.dtype = str(first.dtype)
        if self.dtype not in ("float16", "float32"):
            raise self._wrong("q0", f"type {self.dtype}", "float16 or float32", "convert it")
        self.prompt_tokens = self._prompt_tokens()

    def __enter__(self) -> _QkvFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def name(self) -> str:
        """Name for the model that nobody told us."""
        return self._path.stem

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    def rows(self, layer: int) -> dict[str, Array]:
        """q, k, v and, where the file has them, q_prerope of a layer, `[token, head, head_dim]`."""
        kinds = (*_KINDS, "q_prerope") if "q_prerope" in self.extra else _KINDS
        return {kind: self.array(kind, layer) for kind in kinds}

    def scores(self, layer: int, kv_heads: int) -> dict[str, Array]:
        """`score` of a layer as float32 `[token, kv_head]`; nothing where the file has none."""
        if "score" not in self.extra:
            return {}
        name, expected = f"score{layer}", f"[{kv_heads} kv heads, {self.tokens} tokens]"
        found = self._file[name] if name in self._file.files else np.zeros(0)
        if found.shape != (kv_heads, self.tokens) or found.dtype.kind not in "fiu":
            shape = f"shape {list(found.shape)} of {found.dtype}"
            raise self._wrong(name, shape, f"{expected} of numbers, in every layer", "fix it")
        return {"score": found.T.astype(np.float32)}

    def array(self, kind: str, layer: int) -> Array:
        """One array of the file as `[token, head, head_dim]`."""
        name = f"{kind}{layer}"
        if name not in self._file.files:
            raise InputError(
                f"{self._path} has no array {name}; {self.layers} layers each with q, k, v were"
                " expected; write it too"
            )
        values: Array = self._file[name]
        if values.ndim != 3 or values.shape[1] != self.tokens:
            shape = f"[head, {self.tokens} tokens as in ids, head_dim]"
            raise self._wrong(name, f"shape {list(values.shape)}", shape, "transpose or cut it")
        return values.transpose(1, 0, 2)

    def spec(self, layer: int, rows: dict[str, Array]) -> LayerSpec:
        """The layer that these rows are of, checked for agreement."""
        q, k, v = (rows[kind] for kind in _KINDS)
        kinds = {str(rows[kind].dtype) for kind in rows}
        if kinds != {self.dtype}:
            found = f"types {sorted(kinds)}"
            raise self._wrong(f"layer {layer}", found, f"{self.dtype} as in q0", "convert it")
        if k.shape[2] != q.shape[2] or k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
            found = ", ".join(f"{n}{layer} {list(x.shape[1:])}" for n, x in rows.items())
            expected = "one head_dim in q and k, and q heads a multiple of k and v heads"
            raise self._wrong(f"layer {layer}", f"[head, head_dim] of {found}", expected, "fix it")
        if "q_prerope" in rows and rows["q_prerope"].shape != q.shape:
            found = f"q_prerope {list(rows['q_prerope'].shape)}"
            raise self._wrong(f"layer {layer}", found, f"{list(q.shape)} as q", "fix it")
        return LayerSpec(
            layer=layer,
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            value_dim=v.shape[2],
            scale=q.shape[2] ** -0.5,
        )

    def check_wo(self, specs: Sequence[LayerSpec]) -> None:
        """Refuse output projections that do not fit the layers."""
        if self.wo is None:
            return
        widths = {spec.num_q_heads * spec.value_dim for spec in specs}
        if self.wo.ndim != 3 or len(self.wo) != len(specs) or {self.wo.shape[2]} != widths:
            expected = f"[{len(specs)} layers, hidden, q_head * head_dim = {sorted(widths)}]"
            raise self._wrong("wo", f"shape {list(self.wo.shape)}", expected, "fix or drop it")

    def _ids(self) -> Array:
        if "ids" not in self._file.files:
            raise InputError(
                f"{self._path} has no array ids; the token ids [token] were expected; add them"
            )
        ids: Array = self._file["ids"]
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or not len(ids):
            found = f"shape {list(ids.shape)} of {ids.dtype}"
            raise self._wrong("ids", found, "[token] of integers, at least one", "fix it")
        return ids

    def _prompt_tokens(self) -> int:
        if "prompt_tokens" not in self._file.files:
            return self.tokens
        found = int(self._file["prompt_tokens"])
        if not 1 <= found <= self.tokens:
            raise self._wrong("prompt_tokens", str(found), f"1 to {self.tokens}", "fix it")
        return found

    def _wrong(self, name: str, found: str, expected: str, remedy: str) -> InputError:
        return InputError(f"{name} of {self._path} has {found}; {expected} was expected; {remedy}")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"{path} does not exist; an .npz file was expected; check the path")
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is no .npz file; one written by numpy.savez was expected; check the path"
        )
    try:
        # No pickles: a file from outside must not run code.
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} cannot be read ({error}); a whole .npz file was expected; copy it again"
        ) from error


def _write(writer: TraceWriter, file: _QkvFile, specs: list[LayerSpec]) -> None:
    model = writer.add_model(name=file.name, num_layers=file.layers, dtype=file.dtype)
    writer.add_layers(model, specs)
    if file.wo is not None:
        writer.put_static("wo", file.wo, "layer,hidden,q_head_dim")
    prompt, tokens = file.prompt_tokens, file.tokens
    writer.append(
        "requests", {"request": [0], "run": [0], "model": [model], "prompt_tokens": [prompt]}
    )
    rest: dict[int, dict[str, Array]] = {}
    _begin_step(writer, file, model, 0, 0, prompt)
    for layer, spec in enumerate(specs):
        rows = file.rows(layer)
        rows["lse"] = _lse(spec, rows)
        rows |= file.scores(layer, spec.num_kv_heads)
        writer.append_layer(model, layer, **{kind: x[:prompt] for kind, x in rows.items()})
        rest[layer] = {kind: x[prompt:].copy() for kind, x in rows.items()}
    for number, position in enumerate(range(prompt, tokens), start=1):
        _begin_step(writer, file, model, number, position, position + 1)
        at = position - prompt
        for layer, rows in rest.items():
            writer.append_layer(model, layer, **{kind: x[at : at + 1] for kind, x in rows.items()})


def _lse(spec: LayerSpec, rows: dict[str, Array]) -> Array:
    history = KeyHistory()
    history.extend(rows["k"])
    return row_lse(rows["q"], history, np.arange(len(rows["q"])), spec)


def _begin_step(
    writer: TraceWriter, file: _QkvFile, model: int, number: int, first: int, last: int
) -> None:
    count = last - first
    positions = np.arange(first, last)
    is_prompt = first < file.prompt_tokens
    writer.append(
        "steps",
        {
            "step": [number],
            "run": [0],
            "model": [model],
            "phase": ["prefill" if is_prompt else "decode"],
            "batch_size": [1],
            "num_tokens": [count],
        },
    )
    writer.append(
        "tokens",
        {
            "request": [0] * count,
            "position": positions,
            "token_id": file.ids[first:last],
            "source": ["prompt" if is_prompt else "generated"] * count,
            "row": positions,
        },
    )
    writer.append(
        "rows",
        {
            "row": positions,
            "step": [number] * count,
            "request": [0] * count,
            "position": positions,
            "has_query": [True] * count,
        },
    )
