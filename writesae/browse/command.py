"""`writesae browse`: looks at the features of a store in a web browser, or writes the same as files."""

from __future__ import annotations

import argparse
import socket
import sys
import webbrowser
from contextlib import suppress

from .guard import is_loopback

PORT = 8077  # where it is free, so that links keep
_CLOSING = 1  # seconds given to answers under way when the server is stopped


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="a folder that `writesae collect` filled")
    parser.add_argument("--sae", metavar="DIR", help="folder of the dictionaries (default: those the store names)")
    parser.add_argument("--model", metavar="MODEL", help="a model's folder, or default for the embedded one: "
                        "run your own text, and change features while it writes (default: no model)")  # fmt: skip
    parser.add_argument("--results", nargs="+", default=[], metavar="RUN", help="folders of `writesae replace`: what "
                        "they say of a feature stands on its page (default: none)")  # fmt: skip
    parser.add_argument("--cache", metavar="DIR", help="where the table of features is kept (default: STORE.browse)")
    serve = parser.add_argument_group("as a server")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this machine's own lets "
                       "others read the store and run the model, without a password")  # fmt: skip
    serve.add_argument(
        "--port",
        type=_port,
        help=f"port to listen on, 0 for a free one (default: {PORT}, or a free one where that is taken)",
    )
    serve.add_argument("--open", action="store_true", help="open a web browser on it")
    files = parser.add_argument_group("as files")
    files.add_argument(
        "--static", metavar="DIR", help="write the pages there instead, for any host (default: serve them)"
    )
    files.add_argument("--features", type=int, metavar="N", help="pages of the N features of a site with most firings "
                       "(default: all that fired)")  # fmt: skip


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"expected 0 to 65535, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Serves until interrupted, which is how that ends; or writes files. Returns 0, or 130 if writing was stopped."""
    _check(args)
    if args.static:
        from .static_site import write

        return write(_open(args), args.static, args.features)
    with _listen(args.host, args.port) as listening:  # before a long preparation, so that a taken port is told at once
        return _serve(_open(args), listening, args)


def _check(args: argparse.Namespace) -> None:
    if args.features is not None and not args.static:
        raise ValueError("features: expected together with --static, got it alone")
    if args.features is not None and args.features < 1:
        raise ValueError(f"features: expected an integer >= 1, got {args.features}")
    if args.static and (args.open or args.port is not None):
        raise ValueError("static: files are written and nothing is served, expected neither --open nor --port")
    if args.static and args.model:
        raise ValueError("static: files cannot run a model, expected no --model")
    if not args.static:
        _uvicorn()


def _uvicorn():
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ImportError("starlette and uvicorn are needed to browse: pip install writesae[browse]") from error
    return uvicorn


def _open(args: argparse.Namespace):
    from .atlas import Atlas

    return Atlas.open(args.store, sae=args.sae, model=args.model, results=args.results, cache=args.cache)


def _listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens there.

    Raises:
        ValueError: the address is none of this machine's, or the port is taken.
    """
    wanted = [PORT, 0] if port is None else [port]
    for i, number in enumerate(wanted):
        try:
            return socket.create_server((host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except socket.gaierror as error:
            raise ValueError(f"host: expected an address of this machine, got {host!r}: {error.strerror}") from error
        except OSError as error:
            if i + 1 < len(wanted):
                continue
            raise ValueError(
                f"port: {host}:{number} cannot be listened on ({error}); --port 0 takes a free one"
            ) from error
    raise AssertionError("unreachable")


def address(listening: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(atlas, listening: socket.socket, host: str | None = None):
    """A uvicorn server of an atlas; `server.run(sockets=[listening])` serves until `server.should_exit`.

    Args:
        host: as it was asked for, a name perhaps (default: the socket's address).
    """
    from .app import make_app

    uvicorn = _uvicorn()
    settings = uvicorn.Config(
        make_app(atlas, host or listening.getsockname()[0]), log_level="warning", access_log=False, lifespan="off",
        timeout_graceful_shutdown=_CLOSING, server_header=False,
    )  # fmt: skip
    return uvicorn.Server(settings)


def _serve(atlas, listening: socket.socket, args: argparse.Namespace) -> int:
    server, url = make_server(atlas, listening, args.host), address(listening)
    if not is_loopback(args.host):
        also = " and run the model" if atlas.live is not None else ""
        print(
            f"listening on {args.host}: whoever reaches this machine can read the store{also}; there is no password",
            file=sys.stderr,
        )
    print(f"{url}  (Ctrl-C ends it)", flush=True)
    if args.open:
        webbrowser.open(url)
    with suppress(KeyboardInterrupt):  # uvicorn has closed what was open, and passes the signal on
        server.run(sockets=[listening])
    return 0
