"""What a process says when another is gone, and that a process alone asks nobody."""

import re
import time

import pytest
import torch
import torch.distributed as dist
from brain_to_text.errors import DataError, TrainingError
from brain_to_text.training import distributed
from brain_to_text.training.container import RunInterrupted
from brain_to_text.training.distributed import Board, World

HOSTS = (("algo-1", "10.0.0.1"), ("algo-1", "10.0.0.1"), ("algo-2", "10.0.0.2"))
CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:41234"


@pytest.fixture
def board(monkeypatch):
    """board(rank) -> that rank's view of one board."""
    monkeypatch.setattr(distributed, "REASON_SECONDS", 0.1)
    store, boards = dist.HashStore(), []

    def of(rank):
        boards.append(Board(store, rank, HOSTS))
        return boards[-1]

    yield of
    for each in boards:
        each.close()


def lost(board, message=CLOSED):
    with pytest.raises(TrainingError) as raised, board.meeting():
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


def test_a_silent_end_is_put_down_to_the_host_that_went(board):
    assert lost(board(0)).startswith("Lost contact with host algo-2, which gave no reason")
    assert lost(board(2)).startswith("Lost contact with another process of this job")


def test_the_first_reason_on_the_board_is_everyones(board):
    board(2).pin_failure(DataError("Trial 7 is damaged: index again."))
    board(1).pin_failure(TrainingError("a consequence"))
    assert lost(board(0)) == "Rank 2 on algo-2 failed: Trial 7 is damaged: index again."


def test_a_stop_of_one_is_a_stop_of_all(board):
    World(rank=2, size=3, board=board(2)).announce_stop()
    with pytest.raises(RunInterrupted), board(0).meeting():
        raise RuntimeError(CLOSED)


def test_a_board_that_is_gone_too_is_asked_once():
    asked = []

    class Gone:
        def check(self, keys):
            asked.append(keys)
            raise RuntimeError("connection refused")

    board = Board(Gone(), 0, HOSTS)
    assert lost(board).startswith("Lost contact with host algo-2")
    assert len(asked) == 1
    board.close()


def test_running_out_of_memory_is_no_lost_contact(board):
    with pytest.raises(torch.OutOfMemoryError), board(0).meeting():
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_whoever_waits_says_for_whom(board, monkeypatch, caplog):
    monkeypatch.setattr(distributed, "PROGRESS_SECONDS", 0.01)
    monkeypatch.setattr(distributed, "SILENCE_SECONDS", 0.05)
    here, there = board(0), board(1)
    with there.meeting():
        pass
    with pytest.raises(TrainingError) as raised, here.meeting():
        deadline = time.monotonic() + 300
        while "Still waiting for Rank 2 on algo-2 after" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise RuntimeError("[unbound_buffer.cc:81] Timed out waiting 5000ms for recv operation")
    said = r"Rank 2 on algo-2 did not answer for \d+ s: a GPU that hangs"
    assert re.match(said, str(raised.value))
