"""The one error hierarchy, each error with its HTTP status and stable code.

    WeftError
    ├── InvalidRequest 400        a request that cannot be served as written
    │   └── ContextLengthExceeded
    ├── Unauthenticated 401       no key, or one that no tenant owns
    ├── Forbidden 403             a key without the right (admin routes)
    ├── NotFound 404              absent, or another tenant's
    ├── Conflict 409              the name or the state is taken
    ├── TooLarge 413              an upload over the limit
    ├── Unprocessable 422         one of Weft's own objects does not validate
    ├── Overloaded 429            a queue or rate limit
    ├── Internal 500              our fault; carries no details of other tenants
    │   └── EngineCrashed             this request kills engines; trying again would kill another
    ├── Unavailable 503           engine or store away; try again
    ├── DeadlineExceeded 504      the request's own deadline passed
    └── ConfigError               start-up only: exit code 2

The message gives the value, the limit and the remedy; `code` is what programs may match on.
"""

from __future__ import annotations


class WeftError(Exception):
    """Base of everything that Weft raises on purpose."""

    status: int = 500
    type: str = "server_error"
    default_code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s


class InvalidRequest(WeftError):
    """400: the request cannot be served as written; `param` names the field."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_request"


class ContextLengthExceeded(InvalidRequest):
    """400: prompt plus requested tokens exceed the context."""

    default_code = "context_length_exceeded"


class Unauthenticated(WeftError):
    """401: no API key, or one that no tenant owns."""

    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"


class Forbidden(WeftError):
    """403: the key is known but lacks the right."""

    status = 403
    type = "permission_error"
    default_code = "permission_denied"


class NotFound(WeftError):
    """404: absent, or belonging to another tenant (never distinguished)."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class Conflict(WeftError):
    """409: the name or the object's state does not allow this now."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class TooLarge(WeftError):
    """413: the body exceeds the configured limit."""

    status = 413
    type = "invalid_request_error"
    default_code = "too_large"


class Unprocessable(WeftError):
    """422: one of Weft's own objects does not validate."""

    status = 422
    type = "invalid_request_error"
    default_code = "validation_error"


class Overloaded(WeftError):
    """429: a queue or rate limit; `retry_after_s` says when to come back."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"


class Internal(WeftError):
    """500: Weft's own fault."""

    default_code = "internal_error"


class EngineCrashed(Internal):
    """500: the request was found to kill the engine, so it must not be sent again."""

    default_code = "engine_crashed"


class Unavailable(WeftError):
    """503: engine or store away; `retry_after_s` says when to try again."""

    status = 503
    default_code = "unavailable"


class DeadlineExceeded(WeftError):
    """504: the request's own deadline passed before it was served."""

    status = 504
    default_code = "deadline_exceeded"


class ConfigError(WeftError):
    """A bad flag, variable or configuration file: the program stops with exit code 2."""

    default_code = "bad_configuration"
