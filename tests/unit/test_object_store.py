"""A folder as an object store: whole writes, one listing, clear errors."""

import os

import pytest
from brain_to_text.dataset.store import (
    LocalStore,
    ObjectInfo,
    S3Store,
    listing_after_writing,
    open_store,
)
from brain_to_text.errors import StorageError


def test_what_was_written_is_read_and_listed(tmp_path):
    store = open_store(tmp_path)
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.open("a/b.bin").read(2) == b"01"
    assert store.exists("a/b.bin") and not store.exists("a")
    listing = store.list()
    assert list(listing) == ["a/b.bin"]
    assert listing["a/b.bin"].size == 10
    assert (tmp_path / "a/b.bin").stat().st_mode & 0o777 == 0o644


def test_the_etag_changes_with_the_content(tmp_path):
    store = LocalStore(tmp_path)
    store.write("x", b"1")
    before = store.list()["x"]
    os.utime(tmp_path / "x", ns=(1, 1))
    assert store.list()["x"].etag != before.etag


def test_a_write_that_fails_leaves_the_old_object_and_no_scraps(tmp_path, monkeypatch):
    store = LocalStore(tmp_path)
    store.write("x", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"Cannot write .*x \(No space left"):
        store.write("x", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert store.read("x") == b"old"


def test_a_half_written_object_is_not_listed(tmp_path):
    (tmp_path / ".x.abc.partial").write_bytes(b"half")
    assert open_store(tmp_path).list() == {}


def test_an_absent_folder_lists_nothing(tmp_path):
    assert open_store(tmp_path / "absent").list() == {}


def test_an_absent_object_is_named(tmp_path):
    store = open_store(tmp_path)
    for read in (store.read, store.open, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(StorageError, match=r"Cannot read .*nothing\.hdf5 \(No such file"):
            read("nothing.hdf5")


def test_a_range_beyond_the_end_is_an_error(tmp_path):
    store = open_store(tmp_path)
    store.write("x", b"0123")
    with pytest.raises(StorageError, match="gave 2 of 9 bytes from offset 2"):
        store.read_range("x", 2, 9)


@pytest.mark.parametrize("location", ["gs://bucket/x", "http://host/x"])
def test_other_schemes_are_refused(location):
    with pytest.raises(StorageError, match=r"use s3://BUCKET/PREFIX"):
        open_store(location)


def test_an_s3_url_without_a_bucket_is_refused():
    with pytest.raises(StorageError, match="names no bucket"):
        open_store("s3://")


@pytest.mark.parametrize(
    ("url", "normal"),
    [("s3://b", "s3://b"), ("s3://b/", "s3://b"), ("s3://b/p/q/", "s3://b/p/q")],
)
def test_s3_urls_lose_trailing_slashes(url, normal):
    assert S3Store(url).url == normal


def test_a_listing_goes_on_beyond_its_first_page(s3_prefix, s3_environment):
    """S3 lists a thousand keys at a time."""
    folder = s3_environment.root / s3_prefix.removeprefix("s3://")
    folder.mkdir()
    for number in range(1005):
        (folder / f"{number:04d}").touch()
    listing = S3Store(s3_prefix).list()
    assert sorted(listing) == [f"{number:04d}" for number in range(1005)]


class LateStore:
    """Lists a write only the third time it is asked."""

    url = "s3://late/x"

    def __init__(self):
        self.listings = 0

    def list(self):
        self.listings += 1
        return {"a": ObjectInfo("a", 3, "e")} if self.listings >= 3 else {}


def test_a_late_listing_is_waited_for():
    store = LateStore()
    assert listing_after_writing(store, {"a": 3})["a"].etag == "e"
    assert store.listings == 3


def test_a_listing_that_never_shows_the_write_is_an_error():
    with pytest.raises(StorageError, match="does not list a as it was written"):
        listing_after_writing(LateStore(), {"a": 99}, patience=0)
