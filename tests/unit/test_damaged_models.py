"""Damaged and hostile archives, language models and lexicons end in one sentence.

Mutations are drawn from a fixed seed; `ROUNDS=100000 pytest tests/unit/test_damaged_models.py` goes
on for an hour.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from brain_to_text.errors import BrainToTextError, DataError
from brain_to_text.labels.pronunciation import read_lexicon
from brain_to_text.model.trained_model import open_model
from brain_to_text.scoring.language_model import (
    check_language_model,
    estimate_ngrams,
    words_of_model,
)
from support.tiny_models import write_model

SESSIONS = ("t15.2023.08.11", "t15.2023.08.13")
ROUNDS = int(os.environ.get("ROUNDS", "100"))
SENTENCES = ["i see the cat", "i see the dog", "you see the cat"]


def mutations(data: bytes, rounds: int, seed: int = 0):
    """`rounds` damaged copies: a bit, a byte, a run overwritten, cut out, doubled, or cut off."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        bad = bytearray(data)
        place, length = int(random.integers(len(data))), int(random.integers(1, 64))
        match int(random.integers(6)):
            case 0:
                bad[place] ^= 1 << int(random.integers(8))
            case 1:
                bad[place] = int(random.integers(256))
            case 2:
                bad[place : place + length] = random.bytes(min(length, len(bad) - place))
            case 3:
                del bad[place : place + length]
            case 4:
                bad[place:place] = bad[place : place + length]
            case 5:
                del bad[place:]
        yield bytes(bad)


def one_sentence(error: BaseException) -> bool:
    return isinstance(error, BrainToTextError) and "\n" not in str(error)


def packed(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.add(folder, arcname=".")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "model"
    write_model(folder, SESSIONS, n_features=4, n_classes=41)
    return folder


def refusals(read: Callable[[Path], object], path: Path, data: bytes, rounds: int) -> int:
    """How many damaged copies of `data` are refused, each with one sentence."""
    refused = 0
    for number, bad in enumerate(mutations(data, rounds)):
        path.write_bytes(bad)
        try:
            read(path)
        except Exception as error:  # noqa: BLE001
            assert one_sentence(error), f"mutation {number}: {error!r}"
            refused += 1
    return refused


def test_a_damaged_archive_is_one_sentence_or_the_very_model(model, tmp_path):
    whole = open_model(model).weights

    def the_very_model(path: Path) -> None:
        weights = open_model(path).weights
        assert all(torch.equal(weights[name], whole[name]) for name in whole)

    # what packs everything under one checksum lets next to nothing through
    refused = refusals(the_very_model, tmp_path / "model.tar.gz", packed(model), ROUNDS)
    assert refused > 0.95 * ROUNDS


def member(name: str, content: bytes = b"x", **changes: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        for key, value in changes.items():
            setattr(info, key, value)
        file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (member("../checkpoint/best_checkpoint"), "holds no checkpoint/best_checkpoint"),
        (member("/etc/passwd"), "holds no checkpoint/best_checkpoint"),
        (member("./checkpoint/best_checkpoint", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
         "holds no checkpoint/best_checkpoint"),
        (member("checkpoint/best_checkpoint", b"", type=tarfile.FIFOTYPE),
         "holds no checkpoint/best_checkpoint"),
        (gzip.compress(b""), "is damaged"),
        (b"\x1f\x8b", "is damaged"),
        (b"", "is damaged"),
    ],
    ids=range(7),  # gzip's clock is in the bytes: every worker would name the tests differently
)  # fmt: skip
def test_a_hostile_archive_is_one_sentence(data, reason, tmp_path):
    path = tmp_path / "model.tar.gz"
    path.write_bytes(data)
    with pytest.raises(BrainToTextError, match=reason) as caught:
        open_model(path)
    assert one_sentence(caught.value)
    assert list(tmp_path.iterdir()) == [path], "nothing is unpacked"


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x\n", "a: 1\na: 2\n", "[" * 3000, "a: !!python/object:os.system {}\n"]
)
def test_a_hostile_args_file_is_one_sentence(text, model, tmp_path):
    folder = tmp_path / "model"
    write_model(folder, SESSIONS, n_features=4, n_classes=41)
    (folder / "checkpoint" / "args.yaml").write_text(text)
    with pytest.raises(BrainToTextError, match=r"args\.yaml of .* is not valid YAML") as caught:
        open_model(folder)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("compressed", [False, True])
def test_the_words_of_a_damaged_arpa_file_are_one_sentence_or_words(compressed, tmp_path):
    path = tmp_path / "lm"
    estimate_ngrams(SENTENCES).write_arpa(path)
    data = gzip.compress(path.read_bytes()) if compressed else path.read_bytes()
    refused = refusals(words_of_model, path, data, 3 * ROUNDS)
    assert refused > (ROUNDS if compressed else 0)


def test_a_damaged_lexicon_is_one_sentence_or_words(tmp_path):
    data = b"cat K AE T\nnaive N AY IY V\n# a note\nhello(2) HH EH L OW |\n" * 3
    refused = refusals(read_lexicon, tmp_path / "lexicon.txt", data, 3 * ROUNDS)
    assert refused > ROUNDS / 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("cat K BLANK T", "'cat' has BLANK, which is no phoneme"),
        ("cat" + 100_000 * " K AE", "'cat' has 200,000 phonemes"),  # these crashed the search
    ],
)
def test_a_pronunciation_that_nobody_can_say_is_one_sentence(line, reason, tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text(f"dog D AO G\n{line}\n")
    with pytest.raises(DataError, match=f"line 2: {reason}") as caught:
        read_lexicon(path)
    assert one_sentence(caught.value) and len(str(caught.value)) < 200


def test_what_kenlm_crashes_or_swells_on_is_one_sentence(tmp_path):
    pytest.importorskip("kenlm", reason="optional: docker/requirements_sagemaker_words.txt")
    path = tmp_path / "lm.arpa"
    estimate_ngrams(SENTENCES).write_arpa(path)
    text = path.read_text()
    check_language_model(path)
    for bad in (
        text.replace("ngram 2=", "ngram 2=99999999999"),
        text.replace("ngram 1=", "ngram 1=9"),
        text.replace("\\2-grams:", ""),
        text[: len(text) // 2],
        "",
        text.replace("see", "s\udcff", 1),
        "\\data\\\nngram 1=18446744073709551615\nngram 2=1\n\n\\1-grams:\n",
    ):
        path.write_text(bad, errors="surrogateescape")
        with pytest.raises(DataError, match="cannot be used as a language model") as caught:
            check_language_model(path)
        assert one_sentence(caught.value)
