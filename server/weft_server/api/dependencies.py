"""What a route may ask for: the services, the caller's tenant, admin rights, a validated JSON body.

Knows FastAPI's injection and how bodies are read; knows nothing of what the services do.

    router = APIRouter()

    @router.post("/v1/things")
    async def create(services: AppServices, tenant: CallerTenant,
                     body: Annotated[Thing, Depends(weft_body(Thing))]) -> Response: ...
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar, cast

from fastapi import Depends, Request
from pydantic import BaseModel, ValidationError

from weft_server.api.bodies import NeutralValues, invalid_body, read_json_object, strip_unsupported
from weft_server.errors import Forbidden
from weft_server.service.services import Services
from weft_server.service.tenants import Tenant

Model = TypeVar("Model", bound=BaseModel)


async def get_services(request: Request) -> Services:
    """The services that `create_app` was given."""
    return cast(Services, request.app.state.services)


AppServices = Annotated[Services, Depends(get_services)]


async def current_tenant(request: Request, services: AppServices) -> Tenant:
    """The tenant that the request's key belongs to.

    Raises:
        Unauthenticated: keys are configured, and the request brings none or an unknown one.
    """
    tenant = services.tenants.authenticate(request.headers.get("authorization"))
    request.state.tenant = tenant.name
    return tenant


CallerTenant = Annotated[Tenant, Depends(current_tenant)]


async def admin_tenant(tenant: CallerTenant) -> Tenant:
    """The caller, who must hold an admin key when keys are configured.

    Raises:
        Forbidden: the key is valid but not an admin's.
    """
    if not tenant.is_admin:
        raise Forbidden(
            "This route needs an admin key: set `admin = true` for the tenant in the API keys file."
        )
    return tenant


AdminTenant = Annotated[Tenant, Depends(admin_tenant)]


def openai_body(
    model: type[Model], neutral: NeutralValues | None = None
) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads an object of OpenAI's: anything wrong is a 400 that names the field.

    Args:
        model: pydantic model with `extra="forbid"` of the implemented fields.
        neutral: known but unimplemented fields, each with a test of the values that change nothing; such a
            field with another value is `unsupported_parameter`, any further unknown field
            `unknown_parameter`.
    """

    async def read(request: Request) -> Model:
        body = await read_json_object(request)
        if neutral is not None:
            body = strip_unsupported(body, model, neutral)
        try:
            return model.model_validate(body, strict=True)
        except ValidationError as error:
            raise invalid_body(error, status=400) from None

    return read


def weft_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads one of Weft's own objects: anything wrong in it is a 422 that names the field.

    Bad JSON, or JSON that is not an object, is a 400.
    """

    async def read(request: Request) -> Model:
        body = await read_json_object(request)
        try:
            return model.model_validate(body, strict=True)
        except ValidationError as error:
            raise invalid_body(error, status=422) from None

    return read
