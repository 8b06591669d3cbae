"""Look at traces in a browser.

Serves the traces under a folder, or a single trace, on this machine only. Everything is served from
here; the pages ask no other host.

    kvtrace view traces --open
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import socket
import sys
import webbrowser
from pathlib import Path

from kvtrace.errors import InputError

DEFAULT_DIRECTORY = Path("traces")
DEFAULT_PORT = 8050


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the verb takes."""
    parser.add_argument(
        "directory",
        nargs="?",
        type=Path,
        metavar="DIR",
        default=DEFAULT_DIRECTORY,
        help="folder of traces, or one trace (default: traces)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on")
    parser.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port to serve on (default: 8050)"
    )
    parser.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="FILE.py:Class",
        help="offer a policy of your own on the replay page; may be given several times",
    )
    parser.add_argument("--open", action="store_true", help="open the browser")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    check_directory(args.directory)
    offer(args.policy)
    listening = listen(args.host, args.port)
    port = listening.getsockname()[1]
    address = f"http://{browsable(args.host)}:{port}"
    if not is_loopback(args.host):
        print(
            f"warning: {args.host} can be reached from other machines, and there is no "
            "authentication: anyone who can reach it can read these traces",
            file=sys.stderr,
        )
    serve(args.directory, args.host, listening, address, open_browser=args.open)
    return 0


def serve(
    directory: Path, host: str, listening: socket.socket, address: str, *, open_browser: bool
) -> None:
    """Run the application on a socket that is listening already."""
    import uvicorn

    from kvtrace_viewer.app import create_app

    app = create_app(directory, host_names=frozenset({host}))
    config = uvicorn.Config(app.server, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    print(f"kvtrace viewer: {address}  (Ctrl+C stops)", flush=True)
    if open_browser:
        webbrowser.open(address)
    try:
        asyncio.run(server.serve(sockets=[listening]))
    except KeyboardInterrupt:
        return


def offer(policies: list[str]) -> None:
    """Make policies of files known by their names."""
    if policies:
        # Imported here because it pulls in numba, which takes a second the first time.
        from kvtrace_viewer.replay import plugins

        for text in policies:
            plugins.add(text)


def check_directory(directory: Path) -> None:
    """Refuse a folder that does not exist."""
    if not directory.exists():
        raise InputError(
            f"{directory} does not exist; expected a folder of traces or one trace; "
            "record one with `kvtrace demo`, or name another folder"
        )
    if not directory.is_dir():
        raise InputError(
            f"{directory} is a file; expected a folder of traces or one trace; name its folder"
        )


def listen(host: str, port: int) -> socket.socket:
    """Bind before anything slow is loaded, so that a taken port is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(128)
    except (OSError, OverflowError) as error:
        made.close()
        raise InputError(explain(host, port, error)) from error
    return made


def explain(host: str, port: int, error: Exception) -> str:
    """Say why an address cannot be served on."""
    number = getattr(error, "errno", None)
    if number == errno.EADDRINUSE:
        return f"port {port} is in use; a free one was expected; choose another with --port"
    if number == errno.EACCES:
        return f"port {port} is not allowed; expected 1024 or above; choose another with --port"
    if isinstance(error, OverflowError):
        return f"port {port} does not exist; expected 0 to 65535; choose another with --port"
    return f"{host} cannot be served on ({error}); expected an address of this machine; see --host"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def browsable(host: str) -> str:
    """The host as a browser on this machine should write it."""
    if host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
