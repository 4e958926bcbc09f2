"""The FastAPI application: routes, one error form, OpenAPI at /openapi.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from nbdvvol import __version__
from nbdvvol.control.api.guard import Guard
from nbdvvol.control.api.link import add_link
from nbdvvol.control.api.observe import observe_routes
from nbdvvol.control.api.read import read_routes
from nbdvvol.control.api.write import write_routes
from nbdvvol.control.service import Control
from nbdvvol.model.errors import HTTP_STATUS, Code, ErrorBody, NvError

log = structlog.get_logger()


def _answer(status: int, body: ErrorBody) -> JSONResponse:
    return JSONResponse({"error": body.model_dump(mode="json")}, status_code=status)


def _words(errors: Sequence[Any]) -> str:
    """Every validation error on one line, each with its place."""
    said = []
    for error in errors[:50]:
        place = ".".join(str(part) for part in error["loc"] if part != "body")
        text = str(error["msg"]).removeprefix("Value error, ")
        said.append(f"{place}: {text}" if place else text)
    return "; ".join(said)


async def _expected(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, NvError), "registered for NvError"
    return _answer(HTTP_STATUS.get(error.code, 500), error.body())


async def _invalid(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for RequestValidationError"
    body = ErrorBody(code=Code.INVALID, message=_words(error.errors()), hint="see /openapi.json")
    return _answer(400, body)


async def _http(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for HTTPException"
    code = Code.NOT_FOUND if error.status_code == 404 else Code.INVALID
    return _answer(error.status_code, ErrorBody(code=code, message=str(error.detail), hint="see /openapi.json"))


async def _too_deep(_request: Request, _error: Exception) -> JSONResponse:
    return _answer(400, ErrorBody(code=Code.INVALID, message="the JSON is nested too deeply", hint="see /openapi.json"))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    log.error("request broke", path=request.url.path, exc_info=error)
    return _answer(500, ErrorBody(code=Code.INTERNAL, message=repr(error), hint="control's log says more"))


def make_app(control: Control) -> FastAPI:
    """The whole API of one control."""
    app = FastAPI(
        title="nbdvvol control",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        responses={400: {"model": ErrorBody}, 404: {"model": ErrorBody}, 409: {"model": ErrorBody}},
    )
    app.add_exception_handler(NvError, _expected)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RecursionError, _too_deep)
    app.add_exception_handler(Exception, _unexpected)
    app.include_router(read_routes(control))
    app.include_router(observe_routes(control))
    app.include_router(write_routes(control))
    add_link(app, control)
    app.add_middleware(Guard, control=control)
    return app
