"""A folder as an object store: whole writes, one listing, clear errors."""

import dataclasses
import gzip
import os
import tempfile
from pathlib import Path

import pytest
from brain_to_text.dataset import indexing
from brain_to_text.dataset.indexing import index_dataset, load_or_build_manifest
from brain_to_text.errors import DataError, StorageError
from brain_to_text.storage.locations import ObjectInfo, data_files, s3_url, split_s3_url
from brain_to_text.storage.s3_store import S3Store
from brain_to_text.storage.store import LocalStore, gunzipped, open_store


def test_what_was_written_is_read_and_listed(tmp_path):
    assert open_store(tmp_path / "absent").list() == {}
    store = open_store(tmp_path)
    store.write("a/b.bin", b"0123456789")
    (tmp_path / ".x.abc.partial").write_bytes(b"half of a write")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read("a/b.bin", 1, 2) == b"12"
    assert store.exists("a/b.bin") and not store.exists("a")
    assert {key: info.size for key, info in store.list().items()} == {"a/b.bin": 10}
    with pytest.raises(StorageError, match=r"Cannot read .*nothing\.hdf5 \(No such file"):
        store.read("nothing.hdf5")


def test_the_etag_of_a_file_changes_with_whatever_changes_the_file(tmp_path):
    store = LocalStore(tmp_path)
    store.write("x", b"0123")
    etags = [store.list()["x"].etag]
    assert store.list()["x"].etag == etags[0]
    stat = (tmp_path / "x").stat()
    (tmp_path / "x").write_bytes(b"4567")
    os.utime(tmp_path / "x", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as nobody should
    etags.append(store.list()["x"].etag)
    store.write("x", b"4567")
    etags.append(store.list()["x"].etag)
    assert len(set(etags)) == 3


def test_links_to_folders_and_files_are_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "data_train.hdf5").write_bytes(b"123")
    (tmp_path / "data" / "b").mkdir(parents=True)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "data_val.hdf5").symlink_to("../a/data_train.hdf5")
    (tmp_path / "data" / "b" / "back").symlink_to(tmp_path / "data")  # in a circle
    assert sorted(open_store(tmp_path / "data").list()) == ["a/data_train.hdf5", "b/data_val.hdf5"]


def test_what_cannot_be_listed_is_named(tmp_path):
    store = open_store(tmp_path)
    for name, make in (
        ("link", lambda path: path.symlink_to("nowhere")),
        ("session", lambda path: path.symlink_to("/mnt/not-mounted")),
        ("data_train.hdf5", os.mkfifo),
    ):
        make(tmp_path / name)
        with pytest.raises(StorageError, match=rf"Cannot list .*/{name} \((a link to|neither a)"):
            store.list()
        (tmp_path / name).unlink()
    (tmp_path / ".#lock").symlink_to("nowhere")
    assert store.list() == {}


@pytest.mark.parametrize("what", ["session", "session/data_train.hdf5"])
def test_a_folder_or_file_that_may_not_be_read_is_named(what):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "session").mkdir()
        (folder / "session/data_train.hdf5").write_bytes(b"123")
        (folder / what).chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises(StorageError, match=rf"{what} \(Permission denied\)"):
                open_store(folder).list()
        finally:
            os.seteuid(user)
            (folder / what).chmod(0o700)


def test_a_key_cannot_lead_out_of_the_folder(tmp_path):
    store = open_store(tmp_path / "data")
    for key in ("../x", "a/../../x", "/x"):
        for act in (store.read, store.exists, lambda key: store.write(key, b"")):
            with pytest.raises(StorageError, match="leads out of"):
                act(key)


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


def test_only_folders_and_s3_urls_are_taken():
    for location in ("gs://bucket/x", "http://host/x"):
        with pytest.raises(StorageError, match=r"use s3://BUCKET/PREFIX"):
            open_store(location)
    with pytest.raises(StorageError, match="names no bucket"):
        open_store("s3://")


def test_slashes_at_the_ends_of_a_prefix_do_not_matter():
    point = "s3://arn:aws:s3:eu-west-1:1:accesspoint/x/p"
    for url, normal in (
        ("s3://b/", "s3://b"),
        ("s3://b/p/q/", "s3://b/p/q"),
        ("s3://b//p/", "s3://b/p"),
        (f"{point}/", point),
    ):
        assert S3Store(url).url == normal
    assert s3_url("b") == s3_url("s3://b/") == "s3://b"
    assert s3_url("b", "/p/q/", "", "r") == "s3://b/p/q/r"
    assert split_s3_url("s3://b/p/q/model.tar.gz") == ("b", "p/q/model.tar.gz")


@pytest.mark.parametrize("prefix", ["a//b", "a/./b", "../b", "a/b/.."])
def test_a_prefix_that_clients_read_differently_is_refused(prefix):
    for refused in (
        lambda: open_store(f"s3://bucket/{prefix}"),
        lambda: s3_url("bucket", prefix),
        lambda: split_s3_url(f"s3://bucket/{prefix}/x"),
    ):
        with pytest.raises(
            StorageError, match=r"(empty part \(//\)|'\.\.?').*: write s3://bucket/"
        ):
            refused()


def test_damaged_gzip_is_one_sentence_whatever_bit_is_wrong():
    whole = gzip.compress(b"some text, some text, some other text", mtime=0)
    assert gunzipped(whole, "x.gz", "copy it") == gzip.decompress(whole)
    damaged = [whole[:n] for n in range(len(whole))] + [whole + b"more", whole + whole]
    harmless = range(4 * 8, 10 * 8)  # time, speed and system in the header
    for bit in (b for b in range(8 * len(whole)) if b not in harmless and b != 3 * 8):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        with pytest.raises(DataError, match=r"x\.gz is damaged \(.*\): copy it\."):
            gunzipped(data, "x.gz", "copy it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdz\n"),
        ("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI\r"),
        ("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7 "),
        ("AWS_SESSION_TOKEN", "FwoGZXIvYXdzé"),
        ("AWS_REGION", "us-east-1\r"),
    ],
)
def test_a_stray_character_is_named_by_its_variable_and_never_printed(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError) as raised:
        open_store("s3://bucket/data")
    assert f"variable {name} holds" in str(raised.value)
    assert value.strip() not in str(raised.value)


def test_archived_files_are_counted_and_named_with_the_command_that_restores_them():
    listing = {
        f"s{i}/data_train.hdf5": ObjectInfo(f"s{i}/data_train.hdf5", 1, "", storage_class)
        for i, storage_class in enumerate(["GLACIER", "STANDARD", "DEEP_ARCHIVE", "GLACIER_IR", ""])
    }
    with pytest.raises(DataError) as raised:
        data_files(listing, "s3://b/p")
    assert str(raised.value) == (
        "2 of 5 files in s3://b/p cannot be read because they are archived (DEEP_ARCHIVE, GLACIER: "
        "s0/data_train.hdf5, s2/data_train.hdf5): restore it (hours) with 'aws s3api restore-object"
        ' --bucket b --key "p/s0/data_train.hdf5" --restore-request Days=30\', and so each of the '
        "others."
    )


def test_only_archived_files_that_are_to_be_read_stop_a_run(tiny_dataset, monkeypatch):
    store = LocalStore(tiny_dataset.folder)
    manifest = index_dataset(store)
    monkeypatch.setattr(indexing, "load_manifest", lambda *_: manifest)
    key = next(key for key in manifest.files if key.endswith("data_val.hdf5"))
    listing = store.list()
    listing[key] = dataclasses.replace(listing[key], storage_class="GLACIER")
    monkeypatch.setattr(store, "list", lambda: listing)
    monkeypatch.setattr(store, "url", "s3://b/p")
    with pytest.raises(DataError, match=r"1 of .* archived"):
        load_or_build_manifest(store, print)
    others = [session for session in manifest.sessions if session not in key]
    for choice in ({"splits": ["train"]}, {"sessions": others}):
        assert load_or_build_manifest(store, print, **choice) is manifest
