"""A command whose answer is lost on the way may have been applied: it is reported, never repeated."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from weft_server.store.base import Append, Create, StoreUnavailable
from weft_server.store.opening import Store, open_store

pytestmark = pytest.mark.redis


class LosingProxy:
    """Forwards connections to a Redis; with `lose_next`, it closes one instead of handing back an answer."""

    def __init__(self, port: int) -> None:
        self.lose_next = False
        self._redis_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        with closing(client), closing(socket.create_connection(("127.0.0.1", self._redis_port))) as server:
            while words := client.recv(1 << 16):
                server.sendall(words)
                answer = server.recv(1 << 16)
                if self.lose_next:
                    self.lose_next = False
                    return
                client.sendall(answer)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def proxy(shared_redis: Any) -> Iterator[LosingProxy]:
    shared_redis.client.flushall()
    proxy = LosingProxy(shared_redis.port)
    yield proxy
    proxy.close()


@pytest.fixture
def store(proxy: LosingProxy, tmp_path: Path) -> Iterator[Store]:
    with open_store(proxy.url, tmp_path) as opened:
        # Redis knows the script from now on, so that one command is one exchange.
        opened.records.apply([])
        yield opened


@pytest.mark.parametrize(
    "write",
    [
        lambda store: store.records.next_number("n"),
        lambda store: store.records.apply([Append("log", {}), Create("job", "t", "a", {})]),
    ],
    ids=["next_number", "apply"],
)
def test_a_write_whose_answer_is_lost_is_reported_and_done_once(
    store: Store, proxy: LosingProxy, write: Callable[[Store], object]
) -> None:
    proxy.lose_next = True
    with pytest.raises(StoreUnavailable):
        write(store)
    num_numbers = store.records.next_number("n") - 1
    num_events = len(store.records.events("log"))
    assert num_numbers + num_events == 1
    assert len(store.records.list("job", "t")) == num_events
