"""Streaming gives the frames of the whole-trial model, however the bins arrive."""

from __future__ import annotations

import json

import pytest
import torch
from brain_to_text.errors import CheckpointError, InUseError, StorageError
from brain_to_text.model.augmentations import Augmentation
from brain_to_text.model.realtime import METADATA, StreamingDecoder, export_streaming
from brain_to_text.model.trained_model import open_model
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import write_model

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")
T, C = 61, 32


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream") / "model"
    write_model(folder, SESSIONS)
    return open_model(folder)


@pytest.fixture(scope="module")
def decoder(artefact):
    return StreamingDecoder(artefact)


@pytest.fixture(scope="module")
def trial():
    return torch.randn(1, T, C, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def expected(artefact, trial):
    """Per day, the logits of the whole trial at once."""
    model = artefact.build()
    smooth = Augmentation(artefact.config.dataset.data_transforms)
    lengths = torch.tensor([T])
    with torch.no_grad():
        x, _ = smooth(trial, lengths)
        return [model(x, torch.tensor([day]), n_time_steps=lengths) for day in (0, 1)]


def stream(decoder, trial, day, sizes):
    state, frames = decoder.start(), []
    for chunk in trial.split(sizes, dim=1):
        logits, state = decoder(chunk, day, state)
        frames.append(logits)
    return torch.cat([*frames, decoder.finish(day, state)], dim=1)


@st.composite
def cuts(draw):
    """Chunk sizes that sum to T, empty chunks included."""
    places = sorted(draw(st.lists(st.integers(0, T), max_size=12)))
    return [b - a for a, b in zip([0, *places], [*places, T], strict=True)]


@settings(max_examples=20, deadline=None)
@given(sizes=cuts(), day=st.sampled_from([0, 1]))
def test_any_chunks_give_the_whole_trials_frames(decoder, trial, expected, sizes, day):
    with torch.no_grad():
        logits = stream(decoder, trial, day, sizes)
    assert logits.shape == expected[day].shape
    torch.testing.assert_close(logits, expected[day], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")
def test_the_exported_decoder_needs_nothing_of_ours(artefact, trial, expected, tmp_path):
    path = tmp_path / "decoder.pt"
    export_streaming(artefact, path)
    extra = {METADATA: ""}
    loaded = torch.jit.load(str(path), _extra_files=extra)
    metadata = json.loads(extra[METADATA])
    assert metadata["sessions"] == list(SESSIONS)
    with torch.no_grad():
        logits = stream(loaded, trial, 1, [2] * 30 + [1])
    torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-4)


def test_a_frame_appears_as_soon_as_its_bins_are_in(artefact, trial):
    decoder = StreamingDecoder(artefact)
    first = 6 + 4  # a patch and the smoothing's look-ahead
    state, counts = decoder.start(), []
    with torch.no_grad():
        for t in range(first + 4):
            logits, state = decoder(trial[:, t : t + 1], 0, state)
            counts.append(logits.shape[1])
    assert counts == [0] * (first - 1) + [1, 0, 1, 0, 1]


def test_a_model_that_reads_the_future_is_refused(tmp_path):
    write_model(tmp_path / "model", SESSIONS, bidirectional=True)
    with pytest.raises(CheckpointError, match="bidirectional"):
        StreamingDecoder(open_model(tmp_path / "model"))


def test_an_unwritable_place_is_one_sentence(artefact, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        export_streaming(artefact, tmp_path / "file" / "decoder.pt")


def test_only_a_real_time_decoder_is_replaced(artefact, tmp_path):
    target = tmp_path / "best_checkpoint"
    target.write_bytes(b"somebody's weights")
    with pytest.raises(InUseError, match="which this command did not write"):
        export_streaming(artefact, target)
    assert target.read_bytes() == b"somebody's weights"
    for _ in range(2):
        export_streaming(artefact, tmp_path / "decoder.pt")
