"""A target has one writer, and a file says who made it until somebody changes it."""

import io

import h5py
import pytest
from brain_to_text.dataset.making import DatasetInMaking, Origin, origin_of, signed
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage.locations import MANIFEST_NAME
from brain_to_text.storage.store import open_store

KEYS = ("s1/data_train.hdf5", "s2/data_train.hdf5")


def begin(folder, command="encode", options=None, **more) -> DatasetInMaking:
    wanted = options or {"form": "a"}
    return DatasetInMaking(open_store(folder), command, f"{command} x", wanted, KEYS, **more)


def hdf5(**attributes) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs.update(attributes)
    return buffer.getvalue()


def test_an_origin_is_read_until_a_byte_changes():
    origin = Origin("encode", {"form": "a"}, 7, ["x" * 100_000], ["y"])
    data = signed(signed(hdf5(mine=1), Origin("synthesize", {})), origin)
    assert origin_of(data) == origin
    for position in range(0, len(data), 997):
        changed = bytearray(data)
        changed[position] ^= 1
        assert origin_of(bytes(changed)) is None
    assert origin_of(hdf5()) is None and origin_of(b"crc32:00000000") is None


def test_of_two_at_once_the_later_one_goes_on(tmp_path):
    first = begin(tmp_path)
    first.check()
    second = begin(tmp_path)
    with pytest.raises(DataError, match="Another command has begun to write"):
        first.check()
    second.check()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"command": "synthesize"}, "was written by 'encode'"),
        ({"options": {"form": "b"}}, r"begun with other options \(form was a\)"),
    ],
)
def test_another_purpose_is_refused_until_it_may_overwrite(tmp_path, changes, reason):
    begin(tmp_path)
    begin(tmp_path)
    before = (tmp_path / MANIFEST_NAME).read_bytes()
    with pytest.raises(DataError, match=reason):
        begin(tmp_path, **changes)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == before
    begin(tmp_path, overwrite=True, **changes)


def test_a_session_that_is_a_link_into_the_source_is_refused(tmp_path):
    (tmp_path / "src/s1").mkdir(parents=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new/s1").symlink_to(tmp_path / "src/s1")
    with pytest.raises(DataError, match=r"lies in .*src"):
        begin(tmp_path / "new", reads=[tmp_path / "src"])


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="Cannot list"):
        begin(tmp_path / "file")
