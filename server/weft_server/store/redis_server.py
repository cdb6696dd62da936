"""Reaching a Redis server: connections, what its errors mean, and which servers are refused. Knows no keys.

Durability is the server's append-only file. With `appendfsync always` an acknowledged write survives a power
cut. With `everysec`, Redis's default, it survives the death of the Redis process, unless writes to the file
were delayed just then, and a power cut may cost the last second or two. A server without the file, or one
that evicts keys when memory is short, is refused unless the user asked for it.

A command is never sent twice: a write whose answer was lost may have been applied; only its caller can tell.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, ResponseError
from redis.retry import Retry

from weft_server.errors import ConfigError
from weft_server.store.base import StoreUnavailable

_log = logging.getLogger(__name__)

Word: TypeAlias = str | bytes | int
Script: TypeAlias = Callable[[Sequence[Word], Sequence[Word]], Any]
"""A script of the server, called with its keys and its arguments."""

ANSWER_TIMEOUT_S = 2.0
"""How long a server may take to accept a connection or to answer before it counts as away."""


class RedisServer:
    """One Redis server, usable from any thread.

    Connects when first used; a connection found dead is replaced before it is used again, so that a restart
    of the server needs no action here. Answers are those of protocol 2, texts as bytes.
    """

    def __init__(self, url: str) -> None:
        """Take note of the URL; nothing is sent yet.

        Raises:
            ConfigError: the URL is malformed.
        """
        options: dict[str, Any] = {
            "protocol": 2,
            "decode_responses": False,
            "socket_timeout": ANSWER_TIMEOUT_S,
            "socket_connect_timeout": ANSWER_TIMEOUT_S,
            "socket_keepalive": True,
            "retry": Retry(NoBackoff(), 0),
        }
        if url.startswith("unix://"):
            del options["socket_keepalive"]
        try:
            # Untyped on purpose: redis-py annotates most answers as "or awaitable".
            self._client: Any = redis.Redis.from_url(url, **options)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"--store is a malformed Redis URL ({error}); expected redis://[user:password@]host:port/db",
                param="store",
            ) from error

    @property
    def address(self) -> str:
        """`host:port/db`, or the socket's path: for messages, so without the password."""
        options = self._client.get_connection_kwargs()
        place = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        return f"{place}/{options.get('db') or 0}"

    def command(self, *words: Word) -> Any:
        """Run one command; returns its answer.

        Raises:
            StoreUnavailable: the server does not answer, or refuses.
        """
        with self._errors():
            return self._client.execute_command(*words)

    def transaction(self, *commands: Sequence[Word]) -> None:
        """Run commands as one. Raises StoreUnavailable; their fate is then unknown, but the same for all."""
        with self._errors(), self._client.pipeline(transaction=True) as pipeline:
            for words in commands:
                pipeline.execute_command(*words)
            pipeline.execute()

    def script(self, source: str) -> Script:
        """A Lua script, sent to the server when it does not know it. Calling it raises StoreUnavailable."""
        registered = self._client.register_script(source)

        def run(keys: Sequence[Word], args: Sequence[Word]) -> Any:
            with self._errors():
                return registered(keys=keys, args=args)

        return run

    def scan(self, pattern: str) -> Iterator[bytes]:
        """All keys that match a pattern, some perhaps twice. Raises StoreUnavailable."""
        cursor = 0
        while True:
            cursor, keys = self.command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            yield from keys
            if int(cursor) == 0:
                return

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (redis.ConnectionError, redis.TimeoutError) as error:
            _log.warning("Redis at %s does not answer: %s", self.address, error)
            raise StoreUnavailable("The Redis store does not answer; try again", retry_after_s=1.0) from error
        except redis.RedisError as error:
            _log.warning("Redis at %s refused a command: %s", self.address, error)
            raise StoreUnavailable(
                f"The Redis store refused a command: {error}", retry_after_s=5.0
            ) from error


def refuse_lossy_server(server: RedisServer, *, volatile: bool) -> None:
    """Check that the server keeps what it acknowledges.

    Args:
        server: the server to ask.
        volatile: accept a server that loses data, with a warning in the log.

    Raises:
        ConfigError: it would lose data, or does not let that be checked, and `volatile` is false; it does not
            let this user in; or it is a cluster.
        StoreUnavailable: it does not answer.
    """
    try:
        server.command("PING")
        problems = _durability_problems(server)
    except StoreUnavailable as error:
        if isinstance(error.__cause__, AuthenticationError | NoPermissionError):
            raise ConfigError(
                f"Redis at {server.address} does not let this user in: {error.__cause__}", param="store"
            ) from error
        raise
    if problems and not volatile:
        raise ConfigError(
            f"Redis at {server.address} would lose acknowledged data: {'; '.join(problems)}. "
            "Change that on the server, or accept the loss with --redis-volatile",
            param="redis_volatile",
        )
    for problem in problems:
        _log.warning("Redis at %s may lose acknowledged data: %s", server.address, problem)


def _durability_problems(server: RedisServer) -> list[str]:
    """What would lose acknowledged data, by INFO: managed servers often answer that and forbid CONFIG."""
    try:
        info = {
            name: value
            for section in ("server", "persistence", "memory")
            for name, value in cast(dict[str, object], server.command("INFO", section)).items()
        }
    except StoreUnavailable as error:
        if not isinstance(error.__cause__, ResponseError):
            raise
        return [f"INFO is forbidden to this user, so what it keeps cannot be checked ({error.__cause__})"]
    if info.get("redis_mode") == "cluster":
        raise ConfigError(
            f"Redis at {server.address} is a cluster, which cannot change several keys atomically; "
            "use a single server, replicated if need be",
            param="store",
        )
    _report_flushing(server)
    problems = []
    if info.get("aof_enabled") != 1:
        problems.append("its append-only file is off (set appendonly yes)")
    policy = info.get("maxmemory_policy")
    if info.get("maxmemory") != 0 and policy != "noeviction":
        problems.append(f"maxmemory-policy {policy} evicts keys when memory is short (set noeviction)")
    return problems


def _report_flushing(server: RedisServer) -> None:
    try:
        policy = server.command("CONFIG GET", "appendfsync").get("appendfsync")
    except StoreUnavailable as error:
        if not isinstance(error.__cause__, ResponseError):
            raise
        _log.warning(
            "Redis at %s forbids CONFIG, so its appendfsync cannot be checked: %s",
            server.address,
            error.__cause__,
        )
        return
    if policy == "no":
        _log.warning(
            "Redis at %s has appendfsync no: a power cut loses what the kernel had not yet written",
            server.address,
        )
