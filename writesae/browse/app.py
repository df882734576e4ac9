"""The server: pages made when they are asked for, the table's columns, and what runs the model.

/                          the list of features        /data/NAME     its columns
/LAYER/HEAD/FEATURE        a feature, for ever         /LxHy/N.html   the same, as an export calls it
/text, /try, /about        with a model the first two  /api/text, /api/compare   POST, JSON
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import suppress
from typing import Any

from .guard import Guard
from .links import link
from .pages import HERE, KINDS, Missing, Pages

KINDS_OF_FILES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LONGEST_BODY = 256 * 1024  # bytes of a request
_AHEAD = 64  # events made before the reader has taken them


def assets() -> dict[str, tuple[bytes, str]]:
    """{name: (contents, media type)} of every script, style and picture of the pages."""
    return {
        path.name: (path.read_bytes(), KINDS_OF_FILES[path.suffix])
        for path in sorted((HERE / "assets").iterdir())
        if path.suffix in KINDS_OF_FILES
    }


def make_app(atlas: Any, host: str = "127.0.0.1"):
    """An ASGI application over an atlas, guarded (`guard.Guard`) as one that listens on `host`.

    Raises:
        ImportError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as error:
        raise ImportError("starlette is needed to browse: pip install writesae[browse]") from error

    pages, files, one = Pages(atlas), assets(), threading.Lock()
    _ = pages.index, pages.columns.tokens_json  # made now, so that nobody waits for them

    def page(make: Callable[[], str]) -> Callable:
        return lambda request: HTMLResponse(make())

    def where(request: Request) -> tuple[int, int, int]:
        return request.path_params["layer"], request.path_params["head"], request.path_params["feature"]

    def feature(request: Request) -> Response:
        try:
            with one:  # a store's files are read by one thread at a time
                return HTMLResponse(pages.feature(*where(request)))
        except (ValueError, OSError) as error:  # a damaged file
            return broken(request, error)

    def exported(request: Request) -> Response:
        to = link(*where(request))
        return RedirectResponse(f"../{to}", 301)

    def data(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            body = pages.columns.file(name)
        except KeyError:
            raise HTTPException(404) from None
        kind = "application/json" if name.endswith(".json") else "application/octet-stream"
        return Response(body, media_type=kind)

    def asset(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return Response(found[0], media_type=found[1])

    def missing(request: Request, error: Exception) -> Response:
        depth = request.url.path.count("/") - 1
        if isinstance(error, Missing):
            return HTMLResponse(pages.error(error.title, error.hint, depth), 404)
        title = "There is no such page"
        return HTMLResponse(
            pages.error(title, "A feature’s page is /LAYER/HEAD/NUMBER, such as /5/3/1258.", depth), 404
        )

    def broken(request: Request, error: Exception) -> Response:
        depth = request.url.path.count("/") - 1
        text = f"{type(error).__name__}: {error}"[:500]
        return HTMLResponse(pages.error("This page could not be made", text, depth), 500)

    def as_json(value: dict, status: int = 200) -> Response:
        return Response(json.dumps(value), status, media_type="application/json")  # in ASCII: half a surrogate pair too

    def refused(error: Exception, status: int = 400) -> Response:
        return as_json({"error": str(error)}, status)

    async def body_of(request: Request) -> dict:
        whole = b""
        async for part in request.stream():
            whole += part
            if len(whole) > LONGEST_BODY:
                raise ValueError(f"request: expected at most {LONGEST_BODY:,} bytes, got more")
        try:
            found = json.loads(whole)
        except (ValueError, RecursionError):
            raise ValueError("request: expected JSON, got something else") from None
        if not isinstance(found, dict):
            raise ValueError(f"request: expected a JSON object, got a {type(found).__name__}")
        return found

    async def text(request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        try:
            asked = await body_of(request)
            sites = None if asked.get("sites") is None else [_site(x) for x in _list(asked, "sites")]
            found = await run_in_threadpool(atlas.live.text, _string(asked, "text"), sites=sites)
        except ValueError as error:
            return refused(error)
        return as_json(_fired(pages, found))

    async def compare(request: Request) -> Response:
        try:
            asked = await body_of(request)
            prompt, edits = _string(asked, "prompt"), [_edit(x) for x in _list(asked, "edits")]
            length = asked.get("max_new_tokens", 32)
            if not isinstance(length, int) or isinstance(length, bool):
                raise ValueError(f"max_new_tokens: expected an integer, got {type(length).__name__}")
            events = _events(lambda: atlas.live.compare(prompt, edits, max_new_tokens=length))
            first = await anext(events)
        except ValueError as error:
            return refused(error)
        if "error" in first:
            return refused(ValueError(first["error"]))

        async def lines() -> AsyncIterator[bytes]:
            try:
                yield _line(first)
                async for event in events:
                    yield _line(event)
            finally:
                await events.aclose()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    numbers = "{layer:int}/{head:int}/{feature:int}"
    routes = [
        Route("/", page(lambda: pages.index)), Route("/about", page(pages.about)),
        Route(f"/{numbers}", feature), Route("/L{layer:int}H{head:int}/{feature:int}.html", exported),
        Route("/data/{name}", data), Route("/assets/{name}", asset),
    ]  # fmt: skip
    if pages.live:
        routes += [
            Route("/text", page(pages.text)), Route("/try", page(pages.try_it)),
            Route("/api/text", text, methods=["POST"]), Route("/api/compare", compare, methods=["POST"]),
        ]  # fmt: skip
    handlers: dict = {404: missing, Missing: missing, Exception: broken}
    return Guard(Starlette(routes=routes, exception_handlers=handlers), host)


def _line(event: dict) -> bytes:
    return json.dumps(event).encode() + b"\n"


async def _events(start: Callable[[], Iterator[dict]]) -> AsyncGenerator[dict, None]:
    """Events of a generation that runs in a thread of its own; closing this iterator stops it after its next one."""
    loop, queue, stop = asyncio.get_running_loop(), asyncio.Queue[dict | None](), threading.Event()
    room = threading.Semaphore(_AHEAD)

    def put(event: dict | None) -> None:
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(queue.put_nowait, event)

    def work() -> None:
        events: Any = None
        try:
            events = start()
            for event in events:
                while not room.acquire(timeout=0.2):
                    if stop.is_set():
                        break
                if stop.is_set():
                    break
                put(event)
        except ValueError as error:
            put({"error": str(error)})
        except Exception as error:
            put({"error": f"the model failed: {type(error).__name__}: {error}"[:500]})
        finally:
            if hasattr(events, "close"):
                events.close()
            put(None)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (event := await queue.get()) is not None:
            room.release()
            yield event
    finally:
        stop.set()


def _string(asked: dict, name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {type(value).__name__}")
    return value


def _list(asked: dict, name: str) -> list:
    value = asked.get(name)
    if not isinstance(value, list):
        raise ValueError(f"{name}: expected a list, got {type(value).__name__}")
    return value


def _site(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(_natural(x) for x in value):
        return value[0], value[1]
    raise ValueError("sites: expected pairs [layer, head]")


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _edit(value: Any) -> dict:
    """One edit with its known fields alone: the model's side checks what they mean."""
    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise ValueError(f"edits: expected a kind of {', '.join(KINDS)}")
    for name in ("layer", "head", "feature"):
        if not _natural(value.get(name)):
            raise ValueError(f"edits: {name}: expected an integer >= 0, got {str(value.get(name))[:40]}")
    size = {"erase": None, "scale": "factor", "install": "strength"}[value["kind"]]
    out = {name: value[name] for name in ("kind", "layer", "head", "feature")}
    if size is not None:
        amount = value.get(size)
        if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not abs(amount) <= 1e6:
            raise ValueError(f"edits: {size}: expected a number up to a million, got {str(amount)[:40]}")
        out[size] = float(amount)
    return out


def _finite(x: float) -> float | None:
    """A number as JSON has it; what is none, None."""
    return float(x) if math.isfinite(x) else None


def _fired(pages: Pages, found: dict) -> dict:
    """What fires on a text, for the page: each feature once, with its largest activation in the store and its link."""
    features: dict[tuple[int, int, int], int] = {}
    about: list[dict] = []
    firings: list[list] = []
    for x in found["firings"]:
        key = (int(x["layer"]), int(x["head"]), int(x["feature"]))
        if key not in features:
            features[key] = len(about)
            row = pages.columns.find(*key)
            largest = 0.0 if row is None else float(pages.atlas.table.max[row])
            about.append({
                "name": f"L{key[0]}H{key[1]}/{key[2]}", "link": None if row is None else link(*key),
                "max": largest if 0 < largest < float("inf") else None,
                "writes": [] if row is None else pages.columns.tokens(row, "promoted")[:3],
            })  # fmt: skip
        firings.append([int(x["position"]), features[key], _finite(x["activation"])])
    return {"tokens": list(found["tokens"]), "features": about, "firings": firings}
