"""Archives from the network are unpacked without trusting them."""

import gzip
import io
import tarfile

import pytest
from brain_to_text.errors import JobError
from brain_to_text.launch.fetch import result_table, unpack
from brain_to_text.log_lines import rows_of_log


def archive(path, *members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_files_and_folders_arrive(tmp_path):
    path = archive(
        tmp_path / "model.tar.gz",
        ("./checkpoint", b"", {"type": tarfile.DIRTYPE}),
        ("./checkpoint/best_checkpoint", b"weights", {"mode": 0o6777}),
        ("training_log", b"log", {}),
    )
    unpack(path, tmp_path / "model")
    best = tmp_path / "model" / "checkpoint" / "best_checkpoint"
    assert best.read_bytes() == b"weights"
    assert best.stat().st_mode & 0o7000 == 0
    assert (tmp_path / "model" / "training_log").read_bytes() == b"log"


@pytest.mark.parametrize(
    "member",
    [
        ("../outside", b"x", {}),
        ("a/../../outside", b"x", {}),
        ("/etc/outside", b"x", {}),
        ("a\\..\\..\\outside", b"x", {}),
        ("link", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        ("hard", b"", {"type": tarfile.LNKTYPE, "linkname": "/etc/passwd"}),
        ("pipe", b"", {"type": tarfile.FIFOTYPE}),
        ("device", b"", {"type": tarfile.CHRTYPE}),
        ("training_log", b"second", {}),
    ],
    ids=[
        "parent",
        "hidden-parent",
        "absolute",
        "backslash",
        "symlink",
        "hardlink",
        "fifo",
        "device",
    ]
    + ["twice"],
)
def test_a_dangerous_archive_writes_nothing_at_all(tmp_path, member):
    path = archive(tmp_path / "model.tar.gz", ("training_log", b"log", {}), member)
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    with pytest.raises(JobError, match="is not unpacked because") as refused:
        unpack(path, inside / "model")
    assert repr(member[0])[1:-1] in str(refused.value)
    assert list(inside.iterdir()) == []
    assert sorted(p.name for p in tmp_path.rglob("*outside*")) == []


def test_a_member_of_negative_size_hides_nothing(tmp_path):
    member = tarfile.TarInfo("back")
    member.size = -512
    path = tmp_path / "model.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf(tarfile.GNU_FORMAT) + bytes(10240)))
    with pytest.raises(JobError, match="'back' has a negative size"):
        unpack(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_archive_that_would_fill_the_disk_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("brain_to_text.launch.fetch.MAX_BYTES", 10)
    path = archive(tmp_path / "m.tar.gz", ("a", b"123456", {}), ("b", b"123456", {}))
    with pytest.raises(JobError, match="beyond the limit"):
        unpack(path, tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 20, -8])
def test_a_damaged_archive_leaves_no_half_model(tmp_path, keep):
    path = archive(tmp_path / "m.tar.gz", ("a", bytes(range(256)) * 500, {}))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(JobError, match="fetch it again"):
        unpack(path, tmp_path / "model")
    assert not (tmp_path / "model").exists() and not (tmp_path / "model.partial").exists()


def test_the_result_table_shows_first_best_and_last():
    log = "\n".join(
        f"Val batch {step}: DER (avg): {der} CTC Loss (avg): 1.5 time: 2.0"
        for step, der in ((1500, 0.8), (3000, 0.5), (4500, 0.6))
    )
    assert result_table(rows_of_log(log)) == [
        "       batch  DER (avg)  CTC Loss (avg)",
        "first  1,500     0.8000          1.5000",
        " best  3,000     0.5000          1.5000",
        " last  4,500     0.6000          1.5000",
    ]


def test_without_validation_the_table_says_so():
    assert result_table({}) == ["No validation yet; last training step -1."]
