"""What a process says when another is gone, and that a process alone asks nobody."""

import re
import time

import pytest
import torch
import torch.distributed as dist
from brain_to_text.errors import DataError, TrainingError
from brain_to_text.training import distributed
from brain_to_text.training.container import RunInterrupted
from brain_to_text.training.distributed import RollCall, World

HOSTS = (("algo-1", "10.0.0.1"), ("algo-1", "10.0.0.1"), ("algo-2", "10.0.0.2"))
CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:41234"


@pytest.fixture
def board():
    return dist.HashStore()


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(distributed, "REASON_SECONDS", 0.1)


def world(board=None, rank=0):
    return World(rank=rank, size=3, local_size=2, hosts=HOSTS, board=board)


def lost(one, message=CLOSED):
    with pytest.raises(TrainingError) as raised, one.in_contact():
        raise RuntimeError(message)
    return str(raised.value)


def test_a_process_alone_asks_nobody(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a collective in a world of one")

    for name in ("all_reduce", "all_gather_object", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, forbidden)
    alone = World()
    assert alone.from_main(lambda: 3) == 3
    assert alone.gather(3) == [3]
    assert alone.any(True) and not alone.any(False)
    assert alone.all_on_device(torch.tensor(True)) and not alone.all_on_device(torch.tensor(False))
    alone.meet()
    alone.announce_stop()
    alone.leave(ValueError("x"))


def test_a_silent_end_is_put_down_to_the_host_that_went():
    assert lost(world()).startswith("Lost contact with host algo-2, which gave no reason")
    assert lost(world(rank=2)).startswith("Lost contact with another process of this job")
    assert lost(world(), "Timed out").startswith("Lost contact with another process of this job")


def test_the_first_reason_on_the_board_is_everyones(board, monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    world(board, rank=2).leave(DataError("Trial 7 is damaged: index again."))
    world(board, rank=1).leave(TrainingError("a consequence"))
    said = "Rank 2 on algo-2 failed: Trial 7 is damaged: index again."
    assert lost(world(board)) == said


def test_a_stop_of_one_is_a_stop_of_all(board):
    world(board, rank=2).announce_stop()
    with pytest.raises(RunInterrupted), world(board).in_contact():
        raise RuntimeError(CLOSED)


def test_a_board_that_is_gone_too_is_asked_once():
    asked = []

    class Gone:
        def check(self, keys):
            asked.append(keys)
            raise RuntimeError("connection refused")

    assert lost(world(Gone())).startswith("Lost contact with host algo-2")
    assert len(asked) == 1


def test_running_out_of_memory_is_no_lost_contact():
    with pytest.raises(torch.OutOfMemoryError), world().in_contact():
        raise torch.OutOfMemoryError("CUDA out of memory")


def until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_whoever_waits_says_for_whom(board, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "ROLL_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 0.05)
    names = [f"rank {rank} on {host}" for rank, (host, _) in enumerate(HOSTS)]
    here, there = (RollCall(board, rank, names) for rank in (0, 1))
    with there.waiting():
        pass
    until(lambda: board.check(["brain_to_text/came_to/1"]))
    one = World(rank=0, size=3, local_size=2, hosts=HOSTS, board=board, roll_call=here)
    with pytest.raises(TrainingError) as raised, one.in_contact():
        until(lambda: "Waiting for rank 2 on algo-2 since" in caplog.text)
        raise RuntimeError("[unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation")
    said = r"Rank 2 on algo-2 did not answer for \d+ s: a GPU that hangs"
    assert re.match(said, str(raised.value))
    here.close()
    there.close()
