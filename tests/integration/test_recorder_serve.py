"""`kvtrace record -- transformers serve`: a real server process, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

import kvtrace
from kvtrace import Trace
from kvtrace.block_tables import block_tables
from kvtrace.errors import KvtraceError
from kvtrace_recorder import demo, record

pytestmark = pytest.mark.skipif(
    not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the bundled model is not here"
)
BATCHING = "--continuous-batching --cb-block-size 8 --cb-num-blocks 96 --cb-max-batch-tokens 64"
NEW = 12
QUESTIONS = ["A list is", "A dictionary maps keys to values, and", "A tuple", "The for loop"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The bundled model with a chat template: the messages as they are."""
    folder = tmp_path / "chat-model"
    shutil.copytree(demo.MODEL_DIR, folder)
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


class Server:
    """A recorded server and what it says."""

    def __init__(self, model: Path, out: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.out, self.log = model, out, out.with_suffix(".log")
        transformers = str(Path(sys.executable).parent / "transformers")
        serve = [transformers, "serve", str(model), "--port", str(self.port), *options]
        command = [sys.executable, "-m", "kvtrace.cli", "record", "--out", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--dtype", "float32", "--", *serve, "--host", "127.0.0.1"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def post(self, path: str, body: dict[str, Any], **headers: str) -> tuple[str, str]:
        """The answer and its X-Request-ID."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            json.dumps({"model": str(self.model), **body}).encode(),
            {"Content-Type": "application/json", **headers},
        )
        with urllib.request.urlopen(request, timeout=200) as answer:  # noqa: S310 - our own server
            return answer.read().decode(), answer.headers["x-request-id"]

    def wait(self) -> None:
        """Until it answers."""
        self.until(self._is_up, "did not come up")

    def until(self, done: Callable[[], Any], complaint: str, seconds: float = 240) -> Any:
        """What `done` returns once it is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            if found := done():
                return found
            time.sleep(0.1)
        pytest.fail(f"the server {complaint}:\n{self.log.read_text()}")

    def _is_up(self) -> bool:
        try:
            url = f"http://127.0.0.1:{self.port}/health"
            return bool(urllib.request.urlopen(url, timeout=60).status == 200)
        except OSError:
            return False


@pytest.fixture
def serve(model: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start(*options: str) -> Server:
        started.append(Server(model, tmp_path / "served.kvtrace", *options))
        started[-1].wait()
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()


def ask(server: Server, number: int) -> tuple[str, dict[str, Any], str]:
    """Ask one question: the id, `usage` and the text of the answer."""
    body = {
        "messages": [{"role": "user", "content": QUESTIONS[number]}],
        "max_tokens": NEW + number,
        "stream": number == 3,
    }
    # The server gives ids to those that come without.
    headers = {"X-Request-ID": f"question-{number}"} if number % 2 else {}
    text, name = server.post("/v1/chat/completions", body, **headers)
    if number != 3:
        answer = json.loads(text)
        assert answer["id"] == name
        return name, answer["usage"], answer["choices"][0]["message"]["content"]
    lines = [x.removeprefix("data: ") for x in text.splitlines() if x.startswith("data: {")]
    chunks = [json.loads(line) for line in lines]
    assert {chunk["id"] for chunk in chunks} == {name}
    parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    return name, chunks[-1]["usage"], "".join(parts)


def live_rows(out: Path) -> int:
    try:
        return kvtrace.open(out).rows
    except KvtraceError:
        return 0


def check_requests(trace: Trace, answers: list[tuple[str, dict[str, Any], str]]) -> None:
    """The API's requests, each with all its tokens but the last, which has no key."""
    by_name = {row["external_id"]: row["request"] for row in trace.table("requests").to_pylist()}
    assert set(by_name) == {name for name, _, _ in answers}
    requests = {r.request: r for r in trace.requests()}
    for name, usage, text in answers:
        request = requests[by_name[name]]
        assert request.prompt_tokens == usage["prompt_tokens"]
        assert request.tokens == usage["total_tokens"] - 1
        said = trace.tokens(request.request).slice(request.prompt_tokens)["text"].to_pylist()
        assert text.startswith("".join(said))


CASES = [
    (BATCHING, signal.SIGTERM),
    ("", signal.SIGKILL),
    (BATCHING, signal.SIGKILL),
    ("", signal.SIGTERM),
]


@pytest.mark.parametrize(("options", "ending"), CASES, ids=lambda x: str(x)[:23])
def test_a_server_is_recorded_until_a_signal_ends_it(
    serve: Callable[..., Server], options: str, ending: signal.Signals
) -> None:
    server = serve(*options.split())
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        answers = list(pool.map(lambda number: ask(server, number), range(len(QUESTIONS))))
    tokens = sum(usage["total_tokens"] - 1 for _, usage, _ in answers)
    server.until(lambda: live_rows(server.out) >= tokens, f"did not write {tokens} rows", 20)

    trace = kvtrace.open(server.out)
    assert trace.status == "recording"
    check_requests(trace, answers)
    os.kill(trace.table("runs")["pid"][0].as_py(), ending)
    assert server.process.wait(timeout=200) == 128 + ending

    trace = kvtrace.open(server.out)
    assert trace.status == ("complete" if ending == signal.SIGTERM else "cut off")
    assert f"kvtrace: {tokens} tokens of {len(answers)} requests" in server.log.read_text()
    check_requests(trace, answers)
    assert trace.table("gaps").num_rows == 0
    phases = set(trace.table("steps")["phase"].to_pylist())
    if options:
        assert max(trace.table("steps")["batch_size"].to_pylist()) > 1
        allocated = {e["request"] for e in trace.table("kv_events").to_pylist()}
        assert allocated == {r.request for r in trace.requests()}
        assert block_tables(trace) == {}
        assert phases <= {"prefill", "decode", "mixed"}
    else:
        assert phases == {"prefill", "decode"}


def test_what_generates_for_the_api_knows_its_request(tmp_path: Path) -> None:
    """The server's own manager, without the server: its patches come with its import and go."""
    from transformers.cli.serving.utils import GenerateManager, InferenceThread

    found, tokenizer = demo.load()
    owners: list[tuple[type, str]] = [
        (GenerateManager, "generate_streaming"),
        (GenerateManager, "generate_non_streaming"),
        (InferenceThread, "submit"),
        (InferenceThread, "async_submit"),
    ]
    before = [vars(owner)[name] for owner, name in owners]
    inputs = tokenizer("A list is", return_tensors="pt")
    config = GenerationConfig(max_new_tokens=4, do_sample=False)

    async def ask() -> list[Any]:
        manager = GenerateManager()
        asked = [
            manager.generate_non_streaming(found, tokenizer, inputs, config, request_id=name)
            for name in ("one", "two")
        ]
        return await asyncio.gather(*asked)

    with record(found, tmp_path / "a.kvtrace", strict=True) as recording:
        assert [vars(owner)[name] for owner, name in owners] != before
        asyncio.run(ask())
        found.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [vars(owner)[name] for owner, name in owners] == before
    assert recording.gaps == {}
    requests = kvtrace.open(tmp_path / "a.kvtrace").table("requests")
    assert requests["external_id"].to_pylist() == ["one", "two", None]
