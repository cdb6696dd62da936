"""The order in which a job sees its data."""

from __future__ import annotations

import torch

from weft_server.training.data import ExampleOrder


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    order = ExampleOrder(10, 4, seed=3)
    epochs = [[idx for step in range(3) for idx in order.of_step(3 * epoch + step)] for epoch in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]


def test_a_step_has_the_same_examples_whatever_was_asked_before():
    asked_in_turn = ExampleOrder(10, 4, seed=3)
    steps = [asked_in_turn.of_step(step) for step in range(7)]
    assert ExampleOrder(10, 4, seed=3).of_step(5) == steps[5]
    assert [asked_in_turn.of_step(step) for step in (6, 0, 4)] == [steps[6], steps[0], steps[4]]


def test_an_epoch_is_permuted_once(monkeypatch):
    permuted, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **more: permuted.append(n) or randperm(n, **more))
    order = ExampleOrder(1000, 8, seed=1)
    for step in range(125):
        order.of_step(step)
    assert permuted == [1000]
    order.of_step(125)
    assert permuted == [1000, 1000]
