"""Keeps the viewer to the person in front of it: same-origin requests, nothing loaded elsewhere."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Dash and Mantine need inline styles and scripts; everything else has to come from here.
CONTENT_SECURITY_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
RESPONSE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class SameOriginOnly:
    """Refuses foreign Host and Origin headers, and sets headers that keep the page local.

    A web page elsewhere can point its own name at 127.0.0.1 (DNS rebinding): its requests then
    carry that name as Host. An address or `localhost` cannot be rebound, so only those and the
    names given are answered. A request sent across origins carries its Origin.

    Parameters
    ----------
    app
        The application behind.
    host_names
        Further names to answer to, such as the one given with `--host`.
    """

    def __init__(self, app: ASGIApp, host_names: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.host_names = host_names | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refusal = self.refusal(Headers(scope=scope))
        if refusal is not None:
            await PlainTextResponse(refusal, status_code=403)(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(RESPONSE_HEADERS)
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def refusal(self, headers: Headers) -> str | None:
        """Why a request with these headers is refused; None when it is answered."""
        host = headers.get("host", "")
        if not self.is_ours(urlsplit(f"//{host}").hostname or ""):
            return f"Host {host!r} is not this viewer; open it by its address, such as 127.0.0.1\n"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return f"Request from {origin!r} refused: only the viewer's own pages may ask\n"
        return None

    def is_ours(self, name: str) -> bool:
        """Tell whether a host name cannot have been rebound to this machine by a stranger."""
        if name in self.host_names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
