"""The guides say what the code says."""

import graphlib
import re
import subprocess
import sys

import pytest
from brain_to_text.config import leaves
from brain_to_text.config_reader import load_config
from brain_to_text.launch.request import CODE_FOLDER, METRIC_DEFINITIONS
from support.doc_tables import GUIDE, filled

TOP = CODE_FOLDER.parent
GUIDES = (TOP / "README.md", GUIDE, CODE_FOLDER / "SAGEMAKER_QUICK_START.md")


def text_of(path):
    return path.read_text(encoding="utf-8")


def test_the_guides_tables_are_the_codes():
    assert filled(text_of(GUIDE)) == text_of(GUIDE), "run tests/support/doc_tables.py"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(guide):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(guide)):
        path, _, anchor = target.partition("#")
        place = guide.parent / path if path else guide
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", text_of(place), re.M)
            assert anchor in {h.lower().replace(" ", "-").replace(":", "") for h in headings}


def test_the_table_of_differences_is_that_of_the_two_files():
    section = text_of(GUIDE).split("What changes from phonemes")[1].split("\n`epsilon")[0]
    rows = re.findall(r"\| `([\w.]+)` \| ([\d.]+) \| ([\d.]+) \|", section)
    phonemes, diphones = (
        dict(leaves(load_config(CODE_FOLDER / f"rnn_args_{kind}_sagemaker.yaml").to_dict()))
        for kind in ("phoneme", "diphone")
    )
    assert len(rows) == 7
    for key, one, other in rows:
        assert (phonemes[key], diphones[key]) == (float(one), float(other)), key


def test_every_metric_is_named_in_the_guide():
    assert not [m["Name"] for m in METRIC_DEFINITIONS if f"`{m['Name']}`" not in text_of(GUIDE)]


def test_what_the_troubleshooting_table_quotes_is_printed_by_the_code():
    sources = CODE_FOLDER.rglob("*.py")
    joined = "\n".join(text_of(path) for path in sources)
    joined = re.sub(r'"\s*\n\s*f?"', "", joined)  # text split over lines
    section = text_of(GUIDE).split("## Troubleshooting")[1]
    quotes = [line.split("|")[2] for line in section.splitlines() if line.count("|") >= 5][2:]
    assert len(quotes) > 8
    for quote in quotes:
        (text,) = re.findall(r"`([^`]+)`", quote)
        pattern = re.escape(text).replace(r"s3:GetObject", r"\{action\}").replace("40%", r".*%")
        pattern = re.sub(r"(?<= )(40|R|JOB)", r".+", pattern)
        assert re.search(pattern, joined), text


# The folders in the order in which data moves; "" is the top, which every folder may know.
FOLDERS = ("", "labels", "storage", "dataset", "streaming", "model", "scoring", "training")
KNOWN_TO_LAUNCH = {"", "labels", "storage", "dataset", "launch"}
LIBRARY = CODE_FOLDER / "brain_to_text"


def modules_of_the_library():
    """(folder, file) of every module; the folder of the top is ""."""
    paths = [path for path in sorted(LIBRARY.rglob("*.py")) if path.stem != "__init__"]
    return [(path.relative_to(LIBRARY).parent.as_posix().strip("."), path) for path in paths]


def folders_imported_by(folder, path):
    """The folders of ours that a module imports from."""
    for dots, module in re.findall(r"^\s*from (\.+)([\w.]*) import", text_of(path), re.M):
        if folder and dots == ".":
            yield folder
        else:
            yield module.split(".")[0] if (LIBRARY / module.split(".")[0]).is_dir() else ""


def test_every_folder_of_the_library_has_its_place():
    assert {folder for folder, _ in modules_of_the_library()} == {*FOLDERS, "launch"}
    table = text_of(TOP / ".github/CONTRIBUTING.md").split("## Where things are")[1]
    rows = re.findall(r"^\| `(?:brain_to_text/)?(\w*)`", table, re.M)
    assert rows == [*FOLDERS, "launch"]


def test_no_import_runs_upward():
    wrong = []
    for folder, path in modules_of_the_library():
        own = KNOWN_TO_LAUNCH if folder == "launch" else FOLDERS[: FOLDERS.index(folder) + 1]
        wrong += [
            f"{folder}/{path.name} imports from {other or 'the top'}"
            for other in folders_imported_by(folder, path)
            if other not in own
        ]
    assert wrong == []


def test_no_imports_run_in_a_circle():
    graph: dict[str, set[str]] = {}
    for folder, path in modules_of_the_library():
        known = graph[f"{folder}.{path.stem}"] = set()
        for dots, module in re.findall(r"^\s*from (\.+)([\w.]+) import", text_of(path), re.M):
            inside = folder if dots == "." else ""
            known.add(module if "." in module else f"{inside}.{module}")
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle


def test_the_launcher_needs_no_torch_numpy_or_h5py():
    script = (
        f"import sys; sys.path.insert(0, {str(CODE_FOLDER)!r}); import launch_sagemaker_job; "
        "print(sorted({'torch', 'numpy', 'h5py', 's3fs', 'sagemaker'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_guide_fills_every_blank_of_the_launchers_policy():
    (command,) = re.findall(r"^(sed .*\\\n.*) > policy\.json$", text_of(GUIDE), re.M)
    done = subprocess.run(["bash", "-c", command], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0 and "my-bucket" in done.stdout and "YOUR-" not in done.stdout
