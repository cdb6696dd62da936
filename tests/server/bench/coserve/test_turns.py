"""Generator and trainer never compute at the same time."""

from __future__ import annotations

import socket
import threading
import time

from weft_server.bench.coserve.turns import GeneratorSide, TrainerSide


def test_the_trainer_runs_in_its_turns_alone():
    ends = [end.detach() for end in socket.socketpair()]
    generator, trainer = GeneratorSide(ends[0]), TrainerSide(ends[1], lambda: None)
    work: list[float] = []

    def train():
        trainer.begin()
        for _ in range(100_000):
            trainer.pause_point()
            if trainer.is_over:
                return
            work.append(time.monotonic())

    thread = threading.Thread(target=train)
    thread.start()
    turns = []
    for _ in range(3):
        count = len(work)
        began = time.monotonic()
        generator.give_for(0.01)
        turns.append((began, time.monotonic()))
        given = len(work)
        assert given > count
        assert len(work) == given
    generator.end()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert all(any(begin <= done <= end for begin, end in turns) for done in work)
