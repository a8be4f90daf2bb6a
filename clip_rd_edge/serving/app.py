"""The routes of `clip-rd-edge serve`: who may ask, and what becomes of errors."""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from clip_rd_edge.errors import ClipRdEdgeError, InputError, with_hint
from clip_rd_edge.serving.service import BusyError, Service, error_response
from clip_rd_edge.utils.structs import UnknownFieldError
from clip_rd_edge.web.app import read_body
from clip_rd_edge.web.guard import LOOPBACK, FullError, Guard, TooLargeError, host_names, too_large_message

RETRY_AFTER_S = 1
Handler = Callable[[Request], Awaitable[Response]]


def make_app(
    service: Service, *, token: str = "", host: str = LOOPBACK, names: str | Collection[str] = ()
) -> Starlette:
    """Return the ASGI application.

    Args:
        token: the bearer token that every request but /health needs; empty for none.
        host: that the server listens on.
        names: further host names that requests may use; see `web.guard` for both.
    """
    posts: dict[str, Handler] = {
        "/embeddings": service.embeddings,
        "/embedding": service.embeddings,
        "/v1/embeddings": service.openai_embeddings,
        "/classify": service.classify,
    }
    if service.searches:
        posts["/search"] = service.search
    gets: dict[str, Handler] = {
        "/v1/models": service.models,
        "/v1/models/{name:path}": service.model,
        "/models": service.models,
        "/props": service.props,
        "/health": service.health,
        "/metrics": service.prometheus,
        "/openapi.json": service.openapi,
    }
    routes = [
        Route(path, _answer(path, handler, service, token), methods=[method])
        for method, handlers in (("POST", posts), ("GET", gets))
        for path, handler in handlers.items()
    ]
    guard = Middleware(Guard, host=host, names=host_names(names), token_required=bool(token), respond=error_response)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        service.close()

    unrouted: dict[Any, Any] = {HTTPException: _unrouted}
    return Starlette(routes=routes, middleware=[guard], lifespan=lifespan, exception_handlers=unrouted)


async def _unrouted(request: Request, error: HTTPException) -> Response:
    """Answer a request that no handler takes."""
    allowed = (error.headers or {}).get("Allow", "")
    expected = f"{request.method} is not answered, but {allowed}" if allowed else "there is nothing; see /openapi.json"
    message = f"At {request.url.path}, {expected}."
    return error_response(error.status_code, message, headers=dict(error.headers or {}))


def _answer(path: str, handler: Handler, service: Service, token: str) -> Handler:
    """Wrap a handler: check the token, turn expected errors into answers in OpenAI's form, and count."""

    async def handle(request: Request) -> Response:
        started = time.perf_counter()
        if token and path != "/health" and not _authorised(request, token):
            response = error_response(
                401, "The bearer token is missing or wrong.", headers={"WWW-Authenticate": "Bearer"}
            )
        else:
            response = await _result(handler, request, service)
        service.metrics.finish(path, response.status_code, time.perf_counter() - started)
        return response

    return handle


def _authorised(request: Request, token: str) -> bool:
    scheme, _, sent = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(sent.strip().encode(), token.encode())


async def _result(handler: Handler, request: Request, service: Service) -> Response:
    try:
        if request.method != "POST":
            return await handler(request)
        # Before it counts: requests that are never complete take nobody's turn. The handler gets the body from here.
        await read_body(request)
        with service.turn():
            return await _unless_it_leaves(handler, request)
    except BusyError as error:
        return error_response(503, str(error), headers={"Retry-After": str(RETRY_AFTER_S)})
    except FullError:
        return error_response(503, "Too much is being sent at once.", headers={"Retry-After": str(RETRY_AFTER_S)})
    except TooLargeError:
        return error_response(413, too_large_message())
    except (asyncio.TimeoutError, TimeoutError):
        return error_response(408, "The request did not arrive in time.")
    except ClientDisconnect:
        return error_response(400, "The connection was closed before the request was complete.")
    except UnknownFieldError as error:
        return error_response(422, with_hint(str(error), error.hint))
    except InputError as error:
        return error_response(400, with_hint(str(error), error.hint))
    except ClipRdEdgeError as error:
        return error_response(500, with_hint(str(error), error.hint))


async def _unless_it_leaves(handler: Handler, request: Request) -> Response:
    """Return the handler's response; cancel it if the client closes the connection, to compute nothing for it."""
    task = asyncio.current_task()
    assert task is not None
    end = asyncio.ensure_future(request.receive())  # the body is complete: what comes next is the connection's end
    left = False

    def leave(end: asyncio.Future[Any]) -> None:
        nonlocal left
        if not end.cancelled():
            left = True
            task.cancel()

    end.add_done_callback(leave)
    try:
        return await handler(request)
    except asyncio.CancelledError:
        if not left:
            raise
        if sys.version_info >= (3, 11):
            task.uncancel()
        raise ClientDisconnect from None
    finally:
        end.remove_done_callback(leave)
        end.cancel()
