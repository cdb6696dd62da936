"""A process that works on a store, to be killed or raced: `store_worker.py URL DATA_DIR WHAT [COUNT]`."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from weft_server.store.base import Append, Create, Link, StaleRecord, StoreUnavailable, Update
from weft_server.store.lock import DataDirLock
from weft_server.store.opening import Store, open_store


def write_until_killed(store: Store) -> None:
    """Change `n` makes two records, an event and a link of a blob; it is printed once acknowledged."""
    for n in itertools.count(len(store.records.events("log"))):
        blob = store.blobs.put([f"{n} ".encode() * (1 + n % 7 * 20_000)])
        store.records.apply(
            [
                Create("left", "t", str(n), {"blob": blob}),
                Append("log", {"n": n}),
                Link(blob, f"left:{n}"),
                Create("right", "t", str(n), {"blob": blob}),
            ]
        )
        number = store.records.next_number("changes")
        print(n, number, flush=True)


def increment(store: Store, count: int) -> None:
    """Add 1 to a shared record by compare-and-set, `count` times."""
    for _ in range(count):
        while True:
            record = store.records.get("total", "t", "one")
            assert record is not None
            try:
                store.records.apply([Update(record, {"n": record.value["n"] + 1})])
                break
            except StaleRecord:
                continue


def take_numbers(store: Store, count: int) -> None:
    """Print `count` numbers of a shared counter."""
    for _ in range(count):
        print(store.records.next_number("shared"))


def main() -> None:
    url, data_dir, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if what == "lock":
        with DataDirLock(data_dir):
            print("locked", flush=True)
            sys.stdin.read()
        return
    with open_store(url, data_dir) as store:
        match what:
            case "write":
                try:
                    write_until_killed(store)
                except StoreUnavailable as error:
                    print("unavailable", error, flush=True)
            case "increment":
                increment(store, int(sys.argv[4]))
            case "numbers":
                take_numbers(store, int(sys.argv[4]))


if __name__ == "__main__":
    main()
