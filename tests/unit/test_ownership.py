"""Nothing is written where data is read, and nothing that others wrote is replaced."""

import pytest
from brain_to_text.errors import DataError, InUseError
from brain_to_text.storage.ownership import check_apart, replace_file


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


def test_reports_replace_reports_only(tmp_path):
    report = tmp_path / "report.html"
    for _ in range(2):
        replace_file(report, b"<p>mark</p>", b"mark")
    report.write_bytes(b"a thesis")
    for path in (report, tmp_path, tmp_path / "data_train.hdf5", tmp_path / "manifest.json.gz"):
        with pytest.raises((DataError, InUseError), match=r"give (another|the) name"):
            replace_file(path, b"<p>mark</p>", b"mark")
    assert report.read_bytes() == b"a thesis"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
