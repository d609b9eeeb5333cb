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


SAME, WITHIN, APART = "Source and target are both", "lies in", None


@pytest.mark.parametrize(
    ("read", "written", "reason"),
    [
        *(("src", name, SAME) for name in ("src", "./src", "src/", "x/../src", "link", "up/src")),
        *(("src", name, WITHIN) for name in ("src/new", "link/new", ".", "up", "/")),
        *(("src", name, APART) for name in ("new", "src2", "sr", "../src", "s3://src")),
        ("s3://b/p", "s3://b//p/", SAME),
        ("s3://b/p", "s3://b/p/q", WITHIN),
        ("s3://b", "s3://b/x", WITHIN),
        ("s3://b/p", "s3://b/p2", APART),
        ("s3://b/p", "s3://c/p", APART),
        ("s3://b/P", "s3://b/p", APART),
    ],
)
def test_nothing_is_written_where_data_is_read(source, read, written, reason):
    for pair in ((read, written), (written, read)):
        if reason is APART:
            check_apart(*pair)
        else:
            with pytest.raises(DataError, match=f"{reason}.*: give a"):
                check_apart(*pair)


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
