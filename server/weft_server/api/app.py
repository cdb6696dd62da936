"""The FastAPI application: routers, error handlers, middleware.

The one place that knows all routers. Services are wired elsewhere and handed in.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response

from weft_server import __version__
from weft_server.api import adapters, chat, completions, files, jobs, models, operations
from weft_server.api.errors import install_error_handlers
from weft_server.api.middleware import RequestMiddleware
from weft_server.api.streaming import ClientDisconnectedError, client_closed_response
from weft_server.service.services import Services

ROUTERS = (
    operations.router,
    models.router,
    completions.router,
    chat.router,
    files.router,
    jobs.router,
    adapters.router,
)

logger = logging.getLogger(__name__)


def create_app(services: Services) -> FastAPI:
    """The application over wired services. While it runs in the main thread, SIGHUP reloads the API keys."""
    app = FastAPI(
        title="Weft",
        version=__version__,
        lifespan=_lifespan,
        redoc_url=None,
        # A redirect would lose the body of a POST with a stray slash; a 404 names the path instead.
        redirect_slashes=False,
    )
    app.state.services = services
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    app.add_exception_handler(ClientDisconnectedError, _client_disconnected)
    app.add_middleware(RequestMiddleware, metrics=services.metrics)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    listens = threading.current_thread() is threading.main_thread()
    loop = asyncio.get_running_loop()
    if listens:
        loop.add_signal_handler(signal.SIGHUP, _reload_tenants, services)
    try:
        yield
    finally:
        if listens:
            loop.remove_signal_handler(signal.SIGHUP)


def _reload_tenants(services: Services) -> None:
    if services.tenants.reload():
        services.engine.set_tenant_weights(services.tenants.weights)
        services.engine.set_tenant_concurrency(services.tenants.max_concurrency)


async def _client_disconnected(_request: Request, _error: Exception) -> Response:
    return client_closed_response()
