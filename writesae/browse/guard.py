"""What every answer of the server carries, and which requests it refuses before they reach a page.

- No script, style or picture but the server's own runs on a page, whatever the text of a store says (the policy).
- A name that a stranger's page resolves to this machine is not answered (the Host header), so that it cannot read a
  store through a visitor's browser.
- What runs the model is asked by the server's own pages alone (Origin, Sec-Fetch-Site, JSON).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """An ASGI application around another: refuses strangers' requests and adds `HEADERS` to every answer.

    Args:
        app: the application.
        host: what the server listens on. If not of this machine alone, requests for its addresses and its own names are
            answered too: only a name can be made to point here by someone else.
    """

    def __init__(self, app, host: str = "127.0.0.1"):
        self.app, self.host = app, host
        self.names = {*LOOPBACK, host.lower()}
        self.open = not is_loopback(host)
        if self.open:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}

        async def guarded(message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                names = {name for name, _ in ours}
                message["headers"] = [x for x in message.get("headers", ()) if x[0].lower() not in names] + ours
            await send(message)

        refusal = self.refuses(scope["method"], headers)
        if refusal is None:
            return await self.app(scope, receive, guarded)
        status, text = refusal
        body = text.encode()
        start = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        await guarded({"type": "http.response.start", "status": status, "headers": start})
        await guarded({"type": "http.response.body", "body": body})

    def refuses(self, method: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        """(status, reason) of a request that is not answered, or None."""
        host = headers.get(b"host", "")
        if not self._known(host):
            return 421, "This server does not answer for the name it was asked by.\n"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "Expected GET or POST.\n"
        if headers.get(b"sec-fetch-site", "same-origin") != "same-origin" or not self._same(
            headers.get(b"origin"), host
        ):
            return 403, "Only this server's own pages may ask for that (Origin).\n"
        if headers.get(b"content-type", "").split(";")[0].strip().lower() != "application/json":
            return 415, "Expected application/json.\n"
        return None

    def _known(self, host: str) -> bool:
        name = _without_port(host)
        if name in self.names:
            return True
        return self.open and _is_address(name)

    @staticmethod
    def _same(origin: str | None, host: str) -> bool:
        schemes: Iterable[str] = ("http://", "https://")
        return origin is not None and origin.lower() in {f"{scheme}{host.lower()}" for scheme in schemes}


def _without_port(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
