"""What the log lines tell about a run's progress."""

import pytest
from brain_to_text.log_lines import Progress, duration

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


def test_progress_is_read_from_the_lines():
    progress = Progress.of(LOG.splitlines())
    assert (progress.step, progress.total_steps, progress.loss) == (4600, 150000, 4.10)
    assert [v.step for v in progress.validations] == [1500, 3000, 4500]
    assert progress.validations[0].values == {
        "DER (avg)": 0.7654,
        "CTC Loss (avg)": 4.32,
        "PER (avg)": 0.61,
    }
    assert progress.best.step == 3000
    assert progress.bar() == (
        "[------------------------] 3%  step 4,601/150,000  loss 4.10  best DER 0.7001  "
        "4 h 02 min left"
    )


def test_a_phoneme_run_is_rated_by_its_phoneme_error_rate():
    progress = Progress.of(["Val batch 10: PER (avg): 0.30 CTC Loss (avg): 1.0 time: 2.0"])
    assert progress.best.error_rate == ("PER", 0.30)


def test_before_the_first_line_there_is_nothing_to_show():
    assert Progress().bar() == "step 0"
    assert Progress().best is None


def test_a_loss_that_is_not_a_number_does_not_stop_the_watcher():
    progress = Progress.of(["Train batch 5: loss: nan grad norm: nan time: 0.1"])
    assert progress.step == 5 and progress.loss != progress.loss


@pytest.mark.parametrize(
    "seconds, text",
    [(-3, "0 s"), (59, "59 s"), (61, "1 min"), (3599, "1 h 00 min"), (11100, "3 h 05 min")],
)
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text
