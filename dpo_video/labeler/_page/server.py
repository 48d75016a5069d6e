"""The page's server: starlette and uvicorn on the loopback, with a secret link.

A request is answered with 403 unless its path begins with the token, its Host names the loopback
(otherwise another site could rebind its own name to 127.0.0.1), and its Origin, if the browser
sends one, is the page itself. No other origin is allowed.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import h11
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from dpo_video.errors import UserError
from dpo_video.labeler._page.session import Answer, LabelSession, Side
from dpo_video.labeler._page.sheets import SpriteSheets

LOOPBACK = "127.0.0.1"
NAMES = {LOOPBACK, "localhost", "::1"}
PATIENCE = 10.0  # seconds until a request has to be complete
CONNECTIONS = 64  # at once; a browser opens six
LONGEST_PATH = 200  # characters
BODY = 4096  # bytes; the page's messages are far smaller
HEADERS = {
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}

Name = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True, min_length=1, max_length=40, pattern=r"^[^\x00-\x1f\x7f]+$"
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    rater: Name


class AnswerRequest(_Request):
    """An answer to a segment."""

    pair: int
    segment: int
    answer: Answer
    rest: bool = False
    """Whether to give it to the pair's other unlabelled segments, too."""


class UndoRequest(_Request):
    """Undo of the last change."""

    revision: int


class SheetRequest(_Request):
    """A sprite sheet."""

    side: Side


_R = TypeVar("_R", bound=_Request)


def application(
    session: LabelSession, token: str, *, suggested: str = "", finish: Callable[[], None]
) -> ASGIApp:
    """The page and its JSON interface, below `/token/`.

    The page suggests the name `suggested` to raters; `finish` is called when one ends the session.
    """
    sheets = SpriteSheets(session.task)

    async def page(request: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
            "frame-ancestors 'none'"
        )
        setup = {
            "fps": session.task.fps,
            "segments": [[part.start, part.stop] for part in session.task.segments],
            "total": len(session.task.pairs),
            "raters": session.raters(),
            "suggested": suggested,
        }
        html = _environment().get_template("page.html.j2").render(setup=setup, nonce=nonce)
        return HTMLResponse(html, headers={"content-security-policy": policy})

    async def view(request: Request) -> Response:
        return _json(session.view(_rater(request)))

    async def answer(request: Request) -> Response:
        given = await _body(request, AnswerRequest)
        try:
            return _json(
                session.answer(
                    given.rater, given.pair, given.segment, given.answer, rest=given.rest
                )
            )
        except KeyError as error:
            raise HTTPException(404, str(error.args[0])) from error

    async def undo(request: Request) -> Response:
        given = await _body(request, UndoRequest)
        return _json(session.undo(given.rater, given.revision))

    async def summary(request: Request) -> Response:
        return _json(session.summary(_rater(request)))

    async def picture(request: Request) -> Response:
        pair, segment = request.path_params["pair"], request.path_params["segment"]
        if pair not in session.task.pairs or segment >= len(session.task.segments):
            raise HTTPException(404, f"there is no segment {segment} of a pair {pair}")
        asked = _valid(SheetRequest, side=request.path_params["side"], rater=_named(request))
        first = session.is_first(asked.rater, pair, asked.side)
        png = await sheets.get(pair, segment, first=first)
        return Response(png, media_type="image/png")

    async def end(request: Request) -> Response:
        await _body(request, _Request)
        finish()
        return JSONResponse({})

    def refused(request: Request, error: Exception) -> Response:
        """A UserError, such as a full disk, as its sentence."""
        return JSONResponse({"error": str(error)}, status_code=500)

    def wrong(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, status_code=error.status_code)

    routes = [
        Route("/", page),
        Route("/view", view),
        Route("/answer", answer, methods=["POST"]),
        Route("/undo", undo, methods=["POST"]),
        Route("/summary", summary),
        Route("/end", end, methods=["POST"]),
        Route("/sheet/{pair:int}/{segment:int}/{side}.png", picture),
    ]
    app = Starlette(
        routes=[Mount("/{token}", routes=routes)],
        exception_handlers={UserError: refused, HTTPException: wrong},
    )
    return Gate(app, token)


class Gate:
    """Admits requests that have the token and come from the page itself."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        if self._may_pass(scope):
            await self._app(scope, receive, send_guarded)
        else:
            refusal = PlainTextResponse("Open the link that the terminal shows.", status_code=403)
            await refusal(scope, receive, send_guarded)

    def _may_pass(self, scope: Scope) -> bool:
        given = (scope["path"].split("/", 2)[1:] or [""])[0]  # the path of OPTIONS * is "*"
        # The token is compared in constant time, and always, so that timing reveals nothing.
        valid = secrets.compare_digest(given.encode("utf-8", "surrogateescape"), self._token)
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        local = len(hosts) == 1 and _hostname(f"http://{hosts[0]}") in NAMES
        own = all(local and origin == f"http://{hosts[0]}" for origin in origins)
        return valid and local and own and len(scope["path"]) <= LONGEST_PATH


class Impatient(H11Protocol):
    """A connection that closes if a request is not complete in time: uvicorn waits for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the clock if this completes a request."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        receiving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not receiving:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(PATIENCE, self.transport.close)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(port: int) -> socket.socket:
    """A listening socket on the loopback; port 0 takes any free port.

    Raises:
        UserError: If the port is taken.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((LOOPBACK, port))
        listener.listen()  # the link works before it is printed
    except OSError as error:
        listener.close()
        raise UserError(
            f"Port {port} cannot be used ({error.strerror}). Choose another; --set labeler.port=0 "
            "takes any free one."
        ) from error
    return listener


def serve(
    session: LabelSession, listener: socket.socket, token: str, *, suggested: str = ""
) -> None:
    """Serve until a rater ends the session or a signal does.

    Raises:
        KeyboardInterrupt: After Ctrl-C, once the server is down.
    """

    def finish() -> None:
        server.should_exit = True

    app = application(session, token, suggested=suggested, finish=finish)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            access_log=False,
            http=Impatient,
            lifespan="off",
            limit_concurrency=CONNECTIONS,
            loop="asyncio",
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=2,
            ws="none",
        )
    )
    server.run(sockets=[listener])


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("dpo_video.labeler._page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _named(request: Request) -> str:
    return request.query_params.get("rater", "")


def _rater(request: Request) -> str:
    return _valid(_Request, rater=_named(request)).rater


def _valid(expected: type[_R], **values: str) -> _R:
    try:
        return expected.model_validate(values)
    except ValidationError as error:
        raise HTTPException(400, error.errors()[0]["msg"]) from error


async def _body(request: Request, expected: type[_R]) -> _R:
    # JSON from another origin needs a preflight request, which is never granted.
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(415, "send application/json")
    data = b""
    try:
        async for chunk in request.stream():
            data += chunk
            if len(data) > BODY:
                raise HTTPException(413, "too long")
    except ClientDisconnect as error:
        raise HTTPException(408, "the request was not completed") from error
    try:
        return expected.model_validate_json(data)
    except ValidationError as error:
        raise HTTPException(400, error.errors()[0]["msg"]) from error


def _json(message: BaseModel) -> Response:
    return Response(message.model_dump_json(), media_type="application/json")
