"""Every line of the log says what its reader reads, and what CloudWatch finds."""

import re

import pytest
from brain_to_text.launch.jobs import duration
from brain_to_text.launch.watch import Progress
from brain_to_text.log_lines import (
    METRIC_DEFINITIONS,
    TRAIN_FIELDS,
    VALIDATION_FIELDS,
    best_line,
    best_validation,
    error_rate,
    read_line,
    rows_of_log,
    total_line,
    total_steps,
    train_line,
    validation_line,
)
from brain_to_text.redaction import one_line

IN_CLOUDWATCH = {
    "train:loss": "loss",
    "train:grad_norm": "grad_norm",
    "train:seconds_per_batch": "seconds_per_step",
    "train:trials_per_second": "trials_per_second",
    "train:data_wait_percent": "data_wait_share",
    "validation:DER": "der",
    "validation:PER": "per",
    "validation:CTC_loss": "ctc_loss",
}


def numbers_of(fields, *left_out):
    """A value for each field, which its form writes without loss."""
    values = {field.name: (1 + place) / field.factor for place, field in enumerate(fields)}
    return {"step": 200} | {name: value for name, value in values.items() if name not in left_out}


@pytest.mark.parametrize(
    ("kind", "write", "numbers"),
    [
        ("train", train_line, numbers_of(TRAIN_FIELDS)),
        ("train", train_line, numbers_of(TRAIN_FIELDS, "mfu", "phoneme_loss", "retries")),
        ("validation", lambda n: validation_line(n, "DER"), numbers_of(VALIDATION_FIELDS)),
        ("validation", lambda n: validation_line(n, "PER"), numbers_of(VALIDATION_FIELDS, "der")),
    ],
)
def test_every_line_is_read_as_it_was_written(kind, write, numbers):
    stamped = f"2025-01-15 10:30:00: {write(numbers)}"
    assert read_line(stamped) == (kind, pytest.approx(numbers))
    assert rows_of_log(f"x\n{stamped}\ny") == {kind: [pytest.approx(numbers)]}
    for metric in METRIC_DEFINITIONS:
        name = IN_CLOUDWATCH.get(metric["Name"])
        known = name in numbers and metric["Name"].startswith(f"{kind}:")
        expected = [numbers[name] * (100 if name == "data_wait_share" else 1)] if known else []
        found = [float(text) for text in re.findall(metric["Regex"], stamped)]
        assert found == pytest.approx(expected), metric


@pytest.mark.parametrize("metric", ["DER", "PER"])
def test_the_best_line_is_found_by_cloudwatch(metric):
    line = best_line(metric, float("inf"), 0.76543)
    (regex,) = [m["Regex"] for m in METRIC_DEFINITIONS if m["Name"].endswith(f"best_{metric}")]
    assert re.findall(regex, line) == ["0.7654"]
    assert read_line(line) is None


def test_the_rate_that_chooses_the_model_stands_first():
    numbers = {"step": 3, "der": 0.5, "per": 0.4, "ctc_loss": 2.0, "seconds": 1.0}
    assert validation_line({**numbers, "per_path": 0.3}, "DER") == (
        "Val batch 3: DER (avg): 0.5000 CTC Loss (avg): 2.0000 time: 1.000 PER (avg): 0.4000 "
        "PER (diphone path): 0.3000"
    )
    assert validation_line(numbers, "PER") == (
        "Val batch 3: PER (avg): 0.4000 CTC Loss (avg): 2.0000 time: 1.000"
    )


def test_a_line_cut_anywhere_is_read_without_an_error():
    line = train_line(
        {"step": 7, "loss": 1.5, "grad_norm": 2e-3, "learning_rate": 8e-4, "mfu": 0.4}
    )
    for end in range(len(line)):
        read_line(line[:end])


def test_the_total_is_read_by_the_watcher():
    assert total_steps(total_line(150_000)) == 150_000


@pytest.mark.parametrize(
    ("secret", "said"),
    [
        (
            "https://b.s3.amazonaws.com/k?X-Amz-Signature=abc123&a=b",
            "https://b.s3.amazonaws.com/k?***&a=b",
        ),
        ("k?x=1&X-Amz-Credential=AK%2F26&X-Amz-Security-Token=tok", "k?x=1&***&***"),
        ("k?AWSAccessKeyId=abc&Signature=vjby", "k?***&***"),
        ("http://me:word@host and https://token@host/x", "http://***@host and https://***@host/x"),
        ("AKIAIOSFODNN7EXAMPLE and a-tracking-token", "*** and ***"),
    ],
)
def test_what_opens_doors_is_masked(secret, said, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "a-tracking-token")
    assert one_line(secret) == said


def test_a_name_with_a_line_break_cannot_fake_a_line():
    name = "t15\n2025-01-15 10:30:00: Val batch 9: DER (avg): 0.0001\r\x1b[2K\u2028"
    said = one_line(f"Left out: {name}")
    assert len(said.splitlines()) == 1 and said.isprintable()


LOG = """\
15 10:30:15: Successfully initialized S3-backed datasets
15 10:30:15: Train batches: 150000
15 10:30:16: Train batch 0: loss: 7.43 grad norm: 9.87 time: 0.542
15 10:32:03: Train batch 200: loss: 5.21 grad norm: 8.43 time: 0.538 trials/s: 89.2
15 10:40:00: Running test after training batch: 1500
15 10:40:12: Val batch 1500: DER (avg): 0.7654 CTC Loss (avg): 4.32 time: 12.3 PER (avg): 0.61
15 10:40:12: New best test DER inf --> 0.7654
15 10:50:12: Val batch 3000: DER (avg): 0.7001 CTC Loss (avg): 4.11 time: 12.3 PER (avg): 0.55
15 10:59:12: Val batch 4500: DER (avg): 0.7102 CTC Loss (avg): 4.01 time: 12.3 PER (avg): 0.56
15 10:59:30: Train batch 4600: loss: 4.10 grad norm: 3.43 time: 0.100
"""


def progress_of(text):
    progress = Progress()
    for line in text.splitlines():
        progress.read(line)
    return progress


def test_progress_is_read_from_the_lines():
    progress = progress_of(LOG)
    assert (progress.train["step"], progress.total_steps, progress.train["loss"]) == (
        4600,
        150000,
        4.10,
    )
    assert [row["step"] for row in progress.validations] == [1500, 3000, 4500]
    first = {"step": 1500, "der": 0.7654, "ctc_loss": 4.32, "seconds": 12.3, "per": 0.61}
    assert progress.validations[0] == first
    assert best_validation(progress.validations)["step"] == 3000
    assert progress.bar() == (
        "[------------------------] 3%  step 4,601/150,000  loss 4.10  best DER 0.7001  "
        "4 h 02 min left"
    )


def test_a_phoneme_run_is_rated_by_its_phoneme_error_rate():
    _, row = read_line("Val batch 10: PER (avg): 0.30 CTC Loss (avg): 1.0 time: 2.0")
    assert error_rate(row) == ("PER", 0.30)


def test_before_the_first_line_there_is_nothing_to_show():
    assert Progress().bar() == "step 0"
    assert best_validation([]) is None


def test_a_loss_that_is_not_a_number_does_not_stop_the_watcher():
    row = progress_of("Train batch 5: loss: nan grad norm: nan time: 0.1").train
    assert row["step"] == 5 and row["loss"] != row["loss"]


@pytest.mark.parametrize(
    "seconds, text",
    [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text
