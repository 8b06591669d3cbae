"""Ask an application without a server: its first request, and the tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from starlette.types import ASGIApp, Message


@dataclass
class Answer:
    """What an application answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    content: bytes = b""

    @property
    def json(self) -> Any:
        """The content, decoded."""
        return json.loads(self.content)


def ask(
    app: ASGIApp,
    path: str,
    query: Mapping[str, Any] | None = None,
    *,
    post: Any = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Send one request to an ASGI application.

    Parameters
    ----------
    app
        The application, such as `create_app(root).server`.
    path, query
        What is asked for.
    post
        JSON to send; None asks with GET.
    headers
        Beside `host`, which is 127.0.0.1 unless given.
    """
    body = b"" if post is None else json.dumps(post).encode()
    sent = {"host": "127.0.0.1", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET" if post is None else "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": urlencode(query or {}).encode(),
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    answer = Answer()

    unsent = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not unsent:
            # Nobody hangs up: who waits for that waits until the answer is complete.
            await asyncio.Event().wait()
        return unsent.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.content += message.get("body", b"")

    async def call() -> None:
        await app(scope, receive, send)

    # A thread of its own, since a notebook's thread has a running loop already.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(call())).result()
    return answer
