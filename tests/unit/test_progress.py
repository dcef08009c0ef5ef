"""The progress of a run: what is counted, how the time is estimated, what is printed."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.text import Text

from robsparse.base import files
from robsparse.base.errors import UsageError
from robsparse.tools import progress as module
from robsparse.tools import workflow
from robsparse.tools.progress import Display, Lines, Progress, logger_plugin, update

KEY = "digits/small_cnn/bcs/at/s0.9000/seed0"


def event(name, **data):
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, "", (), None)
    vars(record).update(event=name, **data)
    return record


def job_info(number, rule="train", log=None, message=None):
    word = {"train": "train", "evaluate": "attack"}.get(rule, rule)
    text = message or f"{word} {KEY}"
    return event(
        "job_info", jobid=number, rule_name=rule, rule_msg=text, log=[str(log)] if log else []
    )


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0)


@pytest.fixture
def progress(clock):
    made = Progress(networks=4, evaluations=8, clock=lambda: clock.now)
    made.plan({"train": 3, "evaluate": 6, "collect": 1})
    return made


@pytest.fixture
def tell(progress):
    """tell(event, ...) -> the state after these events."""
    view = Lines(progress)

    def call(*events):
        for one in events:
            update(progress, view, one)
        return progress

    return call


def test_networks_of_earlier_runs_count_as_done(progress, tell, tmp_path):
    assert str(progress) == "1 of 4 networks trained, 2 of 8 attacked"
    assert progress.share == pytest.approx(1 - 9 / 12)
    tell(job_info(1), event("job_finished", job_id=1))
    tell(job_info(2, "evaluate"), event("job_finished", job_ids=[2]))
    assert str(progress).startswith("2 of 4 networks trained, 3 of 8 attacked")


def test_the_time_left_is_that_of_the_jobs_left_on_the_cores_in_use(progress, tell, clock):
    tell(job_info(1), job_info(2, "evaluate"))
    assert progress.seconds_left() is None
    clock.now = 10.0
    tell(event("job_finished", job_id=1))  # a training takes 10 s; evaluations are not known yet
    assert progress.seconds_left() == pytest.approx((2 * 10 + 6 * 10 - 10) / 2)
    clock.now = 40.0
    tell(event("job_finished", job_id=2))  # an evaluation takes 40 s
    assert progress.seconds_left() == pytest.approx((2 * 10 + 5 * 40) / 2)
    tell(job_info(3, "evaluate"))
    clock.now = 70.0
    assert progress.seconds_left() == pytest.approx((2 * 10 + 5 * 40 - 30) / 2)
    assert str(progress).endswith("about 95 s left")


def test_a_failed_job_is_left_and_one_that_is_tried_again_is_not_failed(progress, tell):
    tell(job_info(1), event("job_error", jobid=1))
    assert progress.left["train"] == 3
    assert "1 failed" in str(progress)
    tell(job_info(1))
    assert not progress.failed
    tell(event("job_finished", job_id=1), event("job_finished", job_id=1))  # told twice
    assert progress.left["train"] == 2


@pytest.mark.parametrize("line", ["stopped; run the same command", "stopped by SIGTERM; the same"])
def test_a_stopped_job_has_not_failed(line, progress, tell, tmp_path, capsys):
    log = tmp_path / "job.log"
    log.write_text(f"epoch 1\nrobsparse: {line} again\n")
    tell(job_info(1, log=log), event("job_error", jobid=1))
    assert [*progress.stopped] == [1]
    assert not progress.failed
    assert "failed" not in str(progress) + capsys.readouterr().err
    tell(job_info(1, log=log))  # snakemake starts it again
    assert not progress.stopped
    log.write_text("robsparse: error: no memory\n")
    tell(event("job_error", jobid=1))
    assert [*progress.failed] == [1]
    assert "no memory" in capsys.readouterr().err


def test_a_stop_and_an_error_of_snakemake_are_kept(progress, tell):
    stop = logging.LogRecord(
        "", logging.INFO, "", 0, "Terminating processes on user request, this might take", (), None
    )
    locked = logging.LogRecord("", logging.ERROR, "", 0, "Directory cannot be locked.", (), None)
    tell(stop, locked)
    assert progress.interrupted
    assert progress.messages == ["Directory cannot be locked."]


def test_the_installed_snakemake_names_its_events_as_here():
    from snakemake_interface_logger_plugins.common import LogEvent  # noqa: PLC0415

    used = {"run_info", "job_info", "job_finished", "job_error"}
    assert used <= {str(member.value) for member in LogEvent}
    plugin = logger_plugin(Progress(0, 0), Lines(Progress(0, 0)))
    handler = plugin.LogHandler(None, None)
    assert handler.writes_to_stream
    assert handler.has_filter  # so the option `quiet` of a profile hides no event


LOGS = {
    "train epoch 12/40: loss 0.912 val_clean 0.930 val_robust 0.615 active 5589\n": (
        "train epoch 12/40, robust 61.5 % (validation)"
    ),
    "prune epoch 3/6: loss 0.912 active 5589\n": "prune epoch 3/6",
    "clean: 199/200 correct, 0.1 s\npgd: 151/200 correct, 1.4 s\ntaken\n": "pgd 75.5 %",
    "": "",
}


@pytest.mark.parametrize("text", LOGS)
def test_state_of_a_job_is_read_from_its_log(text, tmp_path):
    (tmp_path / "log").write_text(text)
    assert module.state_of(tmp_path / "log") == LOGS[text]


def test_a_missing_log_has_no_state_and_no_reason(tmp_path):
    assert module.state_of(tmp_path / "none") == ""
    assert module.reason_of(tmp_path / "none") == module.reason_of(None) == "it wrote no message"


def test_the_reason_of_a_failure_is_its_own_message(tmp_path):
    log = tmp_path / "log"
    log.write_text("start\nrobsparse: error: pgd: the network returns NaN\nKilled\n")
    assert module.reason_of(log) == "pgd: the network returns NaN"
    log.write_text("Traceback\nKilled\n\n")
    assert module.reason_of(log) == "Killed"


def test_the_reason_of_a_failure_without_a_log_is_a_full_disk(tmp_path, monkeypatch):
    free = SimpleNamespace(free=5000)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: free)
    assert module.reason_of(tmp_path / "none").startswith(f"{tmp_path}: the disk is full")
    free.free = 10**6
    assert module.reason_of(tmp_path / "none") == "it wrote no message"


def test_lines_of_a_log_name_the_job_its_result_and_how_far_the_run_is(tell, tmp_path, capsys):
    log = tmp_path / "log"
    log.write_text("train epoch 4/4: loss 0.9 val_clean 0.9 val_robust 0.500 active 7\n")
    tell(job_info(1, log=log), event("job_finished", job_id=1))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"train {KEY}: done in 0 s, train epoch 4/4, robust 50.0 % (valid")
    assert "[2 of 4 networks trained" in line
    log.write_text("robsparse: error: no space\n")
    tell(job_info(2, log=log), event("job_error", jobid=2))
    assert capsys.readouterr().err.startswith(f"failed: train {KEY}: no space [")


def test_the_display_shows_the_running_jobs_with_their_state(progress, tmp_path):
    log = tmp_path / "log"
    log.write_text("train epoch 2/4: loss 0.9 val_clean 0.9 val_robust 0.250 active 7\n")
    display = Display(progress)
    update(progress, display, job_info(1, log=log))
    console = Console(width=120, record=True, file=(tmp_path / "screen").open("w"))
    console.print(display._picture())
    text = console.export_text()
    assert "1 of 4 networks trained, 2 of 8 attacked" in text
    assert f"train {KEY}  train epoch 2/4, robust 25.0 % (validation)  0 s" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.4, "41 s"), (599, "599 s"), (600, "10 min"), (36000, "10 h")]
)
def test_times_are_printed_in_words(seconds, text):
    assert module.duration(seconds) == text


# ---------------------------------------------------------------- --set and --only


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("evaluation.n_examples=50", ("evaluation", "n_examples"), 50),
        ("grid.seeds=[0, 3]", ("grid", "seeds"), [0, 3]),
        ("new.section.key=word", ("new", "section", "key"), "word"),
        ("tables.0.title=x", ("tables", 0, "title"), "x"),
        ("threat.eps=8/255", ("threat", "eps"), "8/255"),
    ],
)
def test_a_setting_is_changed_at_its_key(change, path, value):
    data = {"evaluation": {"n_examples": 1}, "grid": {"seeds": [0]}, "tables": [{"title": "t"}]}
    workflow._set(data, change)
    for key in path:
        data = data[key]
    assert data == value


@pytest.mark.parametrize(
    "change", ["n_examples", "=3", "a..b=3", "grid.seeds.first=3", "grid.seeds.7=3", "a=[1"]
)
def test_a_change_of_another_form_is_refused(change):
    with pytest.raises(UsageError, match=r"^--set "):
        workflow._set({"grid": {"seeds": [0]}}, change)


@pytest.fixture
def study(tiny, load_study):
    tiny["grid"] |= {"methods": ["dense", "lwm", "bcs"], "sparsities": [0.5, 0.9], "seeds": [0, 1]}
    return load_study(tiny)


def test_only_the_chosen_networks_are_attacked(study):
    keys = [cell.key for cell in workflow.chosen(study, ["method=lwm", "seed=1", "sparsity=0.90"])]
    assert keys == ["digits/small_cnn/lwm/at/s0.9000/seed1"]
    both = workflow.chosen(study, ["method=lwm,bcs"])
    assert {cell.method for cell in both} == {"lwm", "bcs"}
    assert len(both) == 8
    assert workflow.chosen(study, []) == study.cells()


def test_networks_that_the_chosen_ones_start_from_are_counted(study):
    lwm = workflow.chosen(study, ["method=lwm", "seed=1"])
    found = {cell.key for cell in workflow.with_inputs(study, lwm)} - {cell.key for cell in lwm}
    assert found == {"digits/small_cnn/dense/at/s0.0000/seed1"}


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("metod=lwm", ("expected AXIS=VALUE", "nearest match: 'method'")),
        ("method", ("expected AXIS=VALUE",)),
        ("method=lvm", ("no method 'lvm'", "nearest match: 'lwm'")),
        ("sparsity=90", ("no sparsity '90.0'",)),
        ("sparsity=high", ("no sparsity 'high'",)),
    ],
)
def test_a_wrong_choice_is_one_line(only, words, study):
    with pytest.raises(UsageError) as caught:
        workflow.chosen(study, [only])
    [line] = str(caught.value).splitlines()
    assert all(word in line for word in (f"--only {only}", *words))


def test_a_choice_that_no_network_fits_is_refused(study):
    with pytest.raises(UsageError, match="no network of the study has all of these"):
        workflow.chosen(study, ["method=dense", "sparsity=0.9"])


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_table_at_the_end_fits_the_terminal(monkeypatch):
    table = f"| method | note |\n|---|---|\n| **BCS** | {'word ' * 30}|"
    assert workflow._fitted(table) == table  # in a file
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", Terminal())
    lines = Text.from_ansi(workflow._fitted(table)).plain.splitlines()
    assert max(map(len, lines)) <= 40
    assert len(lines) > 4
    assert "|" not in "".join(lines)
