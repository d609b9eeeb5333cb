"""Nothing is written where data is read, and nothing that others wrote is replaced."""

import pytest
from brain_to_text.errors import DataError
from brain_to_text.storage.ownership import RECORD_NAME, Target, check_apart, replace_own
from brain_to_text.storage.store import open_store

KEYS = ("s1/data_train.hdf5", "s2/data_train.hdf5")


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src/s1").mkdir(parents=True)
    (tmp_path / "src/s1/data_train.hdf5").write_bytes(b"precious")
    (tmp_path / "link").symlink_to("src")
    (tmp_path / "up").symlink_to(".")
    return tmp_path


SAME = (
    "src",
    "./src",
    "src/",
    "src/.",
    "src//",
    "x/../src",
    "src/s1/..",
    "link",
    "up/src",
    "link/",
)
INSIDE = ("src/new", "src/s1", "link/new", "src/s1/deep/er", "./src/../src/new")
AROUND = (".", "up", "src/..", "/")


@pytest.mark.parametrize("target", SAME)
def test_the_source_under_another_name_is_refused(source, target):
    for spelt in (target, str(source / target)):
        with pytest.raises(DataError, match=r"Source and target are both"):
            check_apart("src", spelt)
        with pytest.raises(DataError, match=r"Source and target are both"):
            check_apart(spelt, "src")


@pytest.mark.parametrize("target", INSIDE + AROUND)
def test_a_target_in_the_source_and_around_it_is_refused(source, target):
    with pytest.raises(DataError, match=r"lies in .*: give a target beside the source"):
        check_apart("src", target)


@pytest.mark.parametrize("target", ["new", "src2", "sr", "../src", "x/src", "s3://src"])
def test_places_apart_are_taken(source, target):
    check_apart("src", target)


@pytest.mark.parametrize(
    ("source", "target", "apart"),
    [
        ("s3://b/p", "s3://b//p/", False),
        ("s3://b/p", "s3://b/p/q", False),
        ("s3://b/p/q", "s3://b/p", False),
        ("s3://b", "s3://b/x", False),
        ("s3://b/p", "s3://b/p2", True),
        ("s3://b/p", "s3://c/p", True),
        ("s3://b/P", "s3://b/p", True),
    ],
)
def test_prefixes_are_compared_part_by_part(source, target, apart):
    if apart:
        check_apart(source, target)
    else:
        with pytest.raises(DataError, match="give a"):
            check_apart(source, target)


def test_a_volume_that_ignores_case_says_what_is_the_same(source, monkeypatch):
    from pathlib import Path

    real = Path.samefile
    monkeypatch.setattr(Path, "samefile", lambda a, b: real(Path(str(a).lower()), str(b).lower()))
    lower = str(source).lower()
    if lower != str(source):
        pytest.skip("the folder of this test has capitals")
    with pytest.raises(DataError, match="Source and target are both"):
        check_apart("src", "SRC")
    with pytest.raises(DataError, match="lies in"):
        check_apart("src", "SRC/new")


def claim(place, keys=KEYS, command="encode", purpose=None, **more):
    return Target(open_store(place), command, purpose or {"form": "a"}, keys, **more)


def test_a_session_that_is_a_link_into_the_source_is_refused(source):
    (source / "new").mkdir()
    (source / "new/s1").symlink_to(source / "src/s1")
    with pytest.raises(DataError, match="lies in src"):
        claim(source / "new", reads=["src"])


def test_what_others_wrote_is_refused_by_name_and_replaced_only_aloud(tmp_path):
    (tmp_path / "s2").mkdir()
    (tmp_path / KEYS[1]).write_bytes(b"mine")
    with pytest.raises(
        DataError, match=r"s2/data_train.hdf5, which 'encode' did not write.*--over"
    ):
        claim(tmp_path)
    assert (tmp_path / KEYS[1]).read_bytes() == b"mine" and not (tmp_path / RECORD_NAME).exists()
    claim(tmp_path, overwrite=True).close()
    claim(tmp_path).close()


def test_the_same_command_for_the_same_purpose_goes_on(tmp_path):
    with claim(tmp_path) as target:
        target.store.write(KEYS[0], b"written just before a crash, so not noted")
        target.notes["done"] = [1]
        target.save()
    with claim(tmp_path) as target:
        assert target.notes == {"done": [1]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"command": "synthesize"}, r"was written by 'encode'"),
        ({"purpose": {"form": "b"}}, r"begun with other options \(form was a\)"),
    ],
)
def test_another_purpose_is_refused_or_said_aloud(tmp_path, changes, reason):
    with claim(tmp_path) as target:
        target.notes["done"] = [1]
        target.save()
    with pytest.raises(DataError, match=reason):
        claim(tmp_path, **changes)
    with claim(tmp_path, overwrite=True, **changes) as target:
        assert target.notes == {}, "what was done for another purpose is not done"


def test_two_at_once_are_told_apart(tmp_path):
    with claim(tmp_path), pytest.raises(DataError, match="Another command is writing to"):
        claim(tmp_path)
    claim(tmp_path).close()


def test_where_nothing_can_be_locked_the_later_one_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Target, "_lock", lambda self: None)  # as on S3
    first = claim(tmp_path)
    first.save()
    second = claim(tmp_path)
    with pytest.raises(DataError, match="Another 'encode' has begun to write"):
        first.save()
    second.save()


@pytest.mark.parametrize("damage", [b"", b"\x1f\x8b\x08\x00junk", b"[]", b"{}"])
def test_a_damaged_record_is_one_sentence(tmp_path, damage):
    (tmp_path / RECORD_NAME).write_bytes(damage)
    with pytest.raises(DataError, match=f"{RECORD_NAME} is damaged"):
        claim(tmp_path)


def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Exception, match="Cannot write to"):
        claim(tmp_path / "file")


def test_reports_replace_reports_only(tmp_path):
    report = tmp_path / "report.html"
    for _ in range(2):
        replace_own(report, b"<p>mark</p>", b"mark")
    report.write_bytes(b"a thesis")
    for path in (report, tmp_path, tmp_path / "data_train.hdf5", tmp_path / "manifest.json.gz"):
        with pytest.raises(DataError, match=r"give (another|the) name"):
            replace_own(path, b"<p>mark</p>", b"mark")
    assert report.read_bytes() == b"a thesis"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
