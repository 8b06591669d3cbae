from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kvtrace
from kvtrace import InputError, TraceError
from kvtrace.checksums import document_sum
from kvtrace.testing import SyntheticTrace, write_synthetic
from kvtrace.writer import LayerSpec, TraceWriter

SPEC = LayerSpec(0, 2, 1, 8, 8, 0.5)


def start_step(writer: TraceWriter, model: int, n: int, *, step: int = 0, request: int = 0) -> None:
    """Begin a step of n rows of one request, at positions from 0."""
    writer.append("steps", {"step": [step], "model": [model]})
    first = writer.rows
    writer.append(
        "rows",
        {
            "row": np.arange(first, first + n),
            "step": [step] * n,
            "request": [request] * n,
            "position": range(n),
            "has_query": [True] * n,
        },
    )


def layer_arrays(n: int, spec: LayerSpec, value: float = 1.0) -> dict[str, np.ndarray]:
    """Constant q, k, v, lse of n rows: synthetic."""
    return {
        "q": np.full((n, spec.num_q_heads, spec.head_dim), value, np.float32),
        "k": np.full((n, spec.num_kv_heads, spec.head_dim), value, np.float32),
        "v": np.full((n, spec.num_kv_heads, spec.value_dim), value, np.float32),
        "lse": np.full((n, spec.num_q_heads), value, np.float32),
    }


def test_an_existing_trace_is_replaced_only_with_force(synthetic_trace: SyntheticTrace) -> None:
    path = synthetic_trace().path
    with pytest.raises(TraceError, match="--force"):
        TraceWriter(path)
    assert kvtrace.open(path).rows == 43
    TraceWriter(path, force=True).close()
    assert kvtrace.open(path).rows == 0


@pytest.mark.parametrize("force", [True, False])
def test_what_is_not_a_trace_is_never_replaced(tmp_path: Path, force: bool) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(TraceError, match="not a trace"):
        TraceWriter(precious, force=force)
    assert (precious / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("choice", [{"detail": "everything"}, {"dtype": "int8"}])
def test_an_unknown_choice_names_the_known_ones(tmp_path: Path, choice: dict[str, str]) -> None:
    with pytest.raises(InputError, match="was expected"):
        TraceWriter(tmp_path / "x.kvtrace", **choice)  # type: ignore[arg-type]
    assert not (tmp_path / "x.kvtrace").exists()


def test_values_outside_float16_are_counted(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC])
        writer.append("requests", {"request": [0], "model": [model]})
        start_step(writer, model, 3)
        writer.append_layer(model, 0, **layer_arrays(3, SPEC, 1e6))
    trace = kvtrace.open(writer.path)
    data = trace.layer_data(0)
    assert data.k is not None
    assert (data.k == np.finfo(np.float16).max).all()
    gaps = trace.table("gaps").to_pylist()
    assert {(gap["what"], gap["count"]) for gap in gaps} == {
        ("q values", 3 * 2 * 8),
        ("k values", 3 * 8),
        ("v values", 3 * 8),
    }


def test_a_layer_that_did_not_come_is_nan_and_a_gap(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC, LayerSpec(1, 2, 1, 8, 8, 0.5)])
        writer.append("requests", {"request": [0, 1], "model": [model] * 2})
        for step in range(2):
            start_step(writer, model, 4, step=step, request=step)
            assert not writer.commit()
            writer.append_layer(model, 0, **layer_arrays(4, SPEC))
            if step == 0:
                writer.append_layer(model, 1, **layer_arrays(4, SPEC))
    trace = kvtrace.open(writer.path)
    k = trace.layer_data(1, request=1).k
    assert k is not None
    assert np.isnan(k).all()
    assert not np.isnan(trace.layer_data(1, request=0).k).any()  # type: ignore[arg-type]
    (gap,) = trace.table("gaps").to_pylist()
    assert (gap["what"], gap["count"]) == ("layer rows", 4)


def test_layers_of_other_shapes_and_other_models_share_the_row_axis(tmp_path: Path) -> None:
    small, wide = LayerSpec(0, 2, 1, 8, 8, 0.5), LayerSpec(1, 4, 4, 16, 16, 0.25)
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        first = writer.add_model(name="first")
        writer.add_layers(first, [small, wide])
        second = writer.add_model(name="second")
        writer.add_layers(second, [small])
        for step, model in enumerate([first, second, first]):
            start_step(writer, model, 5, step=step, request=step)
            for spec in [small, wide] if model == first else [small]:
                writer.append_layer(model, spec.layer, **layer_arrays(5, spec, step))
        columns = {"request": [0, 1, 2], "model": [0, 1, 0], "prompt_tokens": [5, 5, 5]}
        writer.append("requests", columns)
    trace = kvtrace.open(writer.path)
    assert [layer.array_group for layer in trace.layers] == [0, 1, 2]
    assert trace.rows == 15
    for request, model in enumerate([first, second, first]):
        assert trace.requests()[request].model == model
        found = trace.layer_data(0, request)
        assert found.spec.model == model
        assert found.k is not None
        assert (found.k == request).all()


def test_rows_must_go_on_where_they_stopped(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic", detail="events") as writer:
        start_step(writer, 0, 3)
        with pytest.raises(ValueError, match="go on from 3"):
            writer.append("rows", {"row": [7]})


def test_a_wrong_number_of_rows_is_refused(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "x.kvtrace", source="synthetic") as writer:
        model = writer.add_model(name="synthetic")
        writer.add_layers(model, [SPEC])
        start_step(writer, model, 3)
        with pytest.raises(ValueError, match="q has 2 rows; the step has 3"):
            writer.append_layer(model, 0, **layer_arrays(2, SPEC))


def test_an_exception_leaves_a_readable_trace_that_is_not_complete(tmp_path: Path) -> None:
    writer = TraceWriter(tmp_path / "x.kvtrace", source="synthetic")

    def fail() -> None:
        with writer:
            write_synthetic(writer, [SPEC], [10, 1])
            raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        fail()
    trace = kvtrace.open(writer.path)
    assert (trace.status, trace.rows) == ("cut off", 11)
    assert trace.attention(0, 0).shape == (11, 11)


def test_a_newer_major_format_is_refused_with_what_to_install(
    synthetic_trace: SyntheticTrace,
) -> None:
    path = synthetic_trace().path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest.update(format_version="2.0", kvtrace_version="9.1", added_later=True)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TraceError, match=r"install kvtrace 9\.1"):
        kvtrace.open(path)
    manifest.update(format_version="1.9")
    manifest["checksum"] = document_sum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert kvtrace.open(path).rows == 43


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"format": "other"}'])
def test_a_path_that_is_no_trace_is_named(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "x.kvtrace"
    path.mkdir()
    if content is not None:
        (path / "manifest.json").write_text(content)
    with pytest.raises(TraceError, match="is not a kvtrace trace"):
        kvtrace.open(path)
    assert kvtrace.list_traces(tmp_path) == []


def test_traces_are_found_below_a_root_but_not_inside_each_other(
    synthetic_trace: SyntheticTrace,
) -> None:
    path = synthetic_trace().path
    (path.parent / "deeper").mkdir()
    inner = path.parent / "deeper/inner.kvtrace"
    TraceWriter(inner).close()
    TraceWriter(path / "cache.kvtrace").close()
    TraceWriter(path.parent / ".hidden/x.kvtrace").close()
    assert kvtrace.list_traces(path.parent) == [inner, path]
    assert kvtrace.list_traces(path) == [path]
