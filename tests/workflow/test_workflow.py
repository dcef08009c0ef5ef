"""The workflow from start to report on a study of a minute, and what runs again after a change."""

import csv
import os
import re
import shutil
import signal
import sys

import filelock
import numpy as np
import pandas as pd
import pytest
import yaml

from robsparse.cli.main import main
from robsparse.figures import PAGE, PLOTS, REPORT, TABLES
from robsparse.records.rows import KEY, Row
from robsparse.study.cells import Cell, Layout
from robsparse.study.loading import load

STUDY = "config/tiny.yaml"
METHODS = 5
PASSING = {"train_seconds", "attack_seconds", "peak_memory_mb", "code_version", "code_dirty"}


def shrink(study):
    """Every method, attack and rule once, with one seed and ten images."""
    study["grid"]["seeds"] = [0]
    study["evaluation"] |= {"n_examples": 10, "batch_size": 10}
    study["evaluation"]["selections"]["last"] = ["clean"]
    return study


@pytest.fixture
def study(tiny):
    return shrink(tiny)


@pytest.fixture(scope="module")
def finished(repository, project_at, tmp_path_factory):
    """A project whose workflow has run from start to report."""
    project = project_at(tmp_path_factory.mktemp("workflow") / "project")
    project.write(shrink(yaml.safe_load((repository / STUDY).read_text())))
    done = project.run("snakemake", "--cores", "2", "--configfile", STUDY)
    logs = "".join(path.read_text() for path in project.root.glob("results/**/logs/**/*.log"))
    assert done.returncode == 0, done.stderr + logs
    return project, done


@pytest.fixture
def again(finished, study):
    """again(change, *words) -> jobs that `snakemake -n` would run for a changed study."""
    project, _ = finished

    def jobs(change, *words, configfile=STUDY):
        change(study)
        project.write(study)
        done = project.run("snakemake", "-n", *words, "--configfile", configfile)
        assert done.returncode == 0, done.stderr
        text = done.stdout + done.stderr
        found = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE)}
        assert found or "Nothing to be done" in text
        return {rule: n for rule, n in found.items() if rule not in ("all", "evaluated", "total")}

    return jobs


# ---------------------------------------------------------------- start to report


def test_every_target_exists_and_is_not_empty(finished):
    project, _ = finished
    layout = Layout(project.root / "results" / "tiny")
    cells = load(project.root / STUDY).cells()
    assert len(cells) == METHODS
    wanted = [layout.root / name for name in (*TABLES, *PLOTS, REPORT, PAGE)]
    wanted += [layout.root / f"results.{suffix}" for suffix in ("csv", "parquet")]
    wanted += [layout.root / name for name in ("layers.csv", "curves.csv", "steps.parquet")]
    for cell in cells:
        wanted += [layout.training(cell), layout.steps(cell)]
        for selection in ("best_val", "last"):
            wanted += [layout.model(cell, selection), layout.evaluation(cell, selection)]
            wanted += [layout.flags(cell, selection)]
    assert [path for path in wanted if not path.exists() or not path.stat().st_size] == []


def test_main_table_is_printed_at_the_end(finished):
    project, done = finished
    table = (project.root / "results" / "tiny" / TABLES[0]).read_text()
    assert table in done.stdout
    assert f"Report: results/tiny/{REPORT}" in done.stdout


def test_nothing_half_written_and_no_checkpoint_is_left(finished):
    project, _ = finished
    names = [path.name for path in project.root.glob("results/**/*") if path.is_file()]
    assert [name for name in names if name.startswith(".") or name.startswith("state")] == []


def rows_of(project):
    with (project.root / "results" / "tiny" / "results.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_row_of_the_results_is_valid_and_every_key_stands_once(finished):
    project, _ = finished
    rows = rows_of(project)
    for row in rows:
        known = {key: value for key, value in row.items() if value != ""}
        Row.model_validate(known)
    keys = [tuple(row[name] for name in KEY) for row in rows]
    assert len(set(keys)) == len(keys)
    whole = {
        (row["method"], row["selection"], row["attack"])
        for row in rows
        if row["component"] == "all"
    }
    attacks = [("best_val", name) for name in ("clean", "pgd", "autoattack")] + [("last", "clean")]
    methods = {row["method"] for row in rows}
    assert len(methods) == METHODS
    assert whole == {(method, *attack) for method in methods for attack in attacks}
    parts = ["apgd-ce", "apgd-t", "fab-t", "square", "all"]
    for method in methods:
        assert parts == [
            r["component"] for r in rows if (r["method"], r["attack"]) == (method, "autoattack")
        ]


def test_csv_and_parquet_hold_the_same_rows(finished):
    folder = finished[0].root / "results" / "tiny"
    one, other = pd.read_csv(folder / "results.csv"), pd.read_parquet(folder / "results.parquet")
    assert list(one.columns) == list(other.columns)
    assert one[[*KEY, "accuracy"]].equals(other[[*KEY, "accuracy"]])


def test_every_row_counts_the_outcomes_of_the_single_images(finished):
    project, _ = finished
    for row in rows_of(project):
        cell = Cell.parse(
            f"{row['dataset']}/{row['arch']}/{row['method']}/{row['objective']}"
            f"/s{float(row['sparsity']):.4f}/seed{row['seed']}"
        )
        path = Layout(project.root / "results" / "tiny").flags(cell, row["selection"])
        with np.load(path) as flags:
            outcomes = flags[f"{row['attack']}.{row['component']}"]
        assert (len(outcomes), outcomes.sum()) == (int(row["n_examples"]), int(row["n_correct"]))


def test_every_job_kept_its_log(finished):
    project, _ = finished
    logs = list(project.root.glob("results/tiny/logs/**/*.log"))
    assert len(logs) == METHODS + 2 * METHODS + 2
    assert all("Traceback" not in path.read_text() for path in logs)


def test_same_study_by_hand_gives_the_same_results(finished, tmp_path, monkeypatch):
    project, _ = finished
    monkeypatch.chdir(project.root)
    elsewhere = ("--results", str(tmp_path))
    chosen = ("dense", "bcs")
    for cell in (cell for cell in load(STUDY).cells() if cell.method in chosen):
        assert main(["train", STUDY, "--cell", cell.key, *elsewhere]) == 0
        for selection in ("best_val", "last"):
            words = ("--cell", cell.key, "--selection", selection)
            assert main(["evaluate", STUDY, *words, *elsewhere]) == 0
    assert main(["collect", STUDY, *elsewhere]) == 0
    one, other = (
        pd.read_csv(folder / "tiny" / "results.csv").drop(columns=[*PASSING])
        for folder in (project.root / "results", tmp_path)
    )
    one = one[one.method.isin(chosen)].reset_index(drop=True)
    pd.testing.assert_frame_equal(one, other)


# ---------------------------------------------------------------- what runs again


def test_second_call_finds_nothing_to_be_done(again):
    assert again(lambda study: None) == {}


@pytest.mark.parametrize("spelling", ["./{}", "config/../{}", "{root}/{}"])
def test_another_spelling_of_the_config_path_reruns_nothing(spelling, again, finished):
    spelled = spelling.format(STUDY, root=finished[0].root)
    assert again(lambda study: None, configfile=spelled) == {}


def add_seed(study):
    study["grid"]["seeds"].append(1)


def add_sparsity(study):
    study["grid"]["sparsities"].append(0.95)


def add_restart(study):
    study["evaluation"]["attacks"]["pgd"]["restarts"] += 1


def add_attack_to_last(study):
    study["evaluation"]["selections"]["last"].append("pgd")


def change_one_method(study):
    study["methods"]["lwm"]["finetune"]["epochs"] += 1


def change_the_start_of_the_pruning_methods(study):
    study["methods"]["dense"]["pretrain"]["epochs"] += 1


def change_the_threat(study):
    study["threat"]["eps"] = 0.1


def change_the_machine(study):
    study["machine"] = {"device": "cpu", "threads": 2, "memory_mb": 3000, "minutes": 5}


def say_a_default(study):
    study["training"]["beta"] = 6
    study["methods"]["bcs"]["train"]["momentum"] = 0.9


def change_the_title(study):
    study["title"] = "Another title"


def remove_a_method(study):
    study["grid"]["methods"].remove("hydra")


def change_a_table(study):
    study["tables"] = [
        {
            "name": "paper",
            "title": "As printed",
            "rows": ["method"],
            "columns": ["sparsity"],
            "attacks": ["pgd"],
            "published": ["config/tiny.yaml"],
        }
    ]


def count_the_code(study):
    study["machine"] = {"rerun_on_code_change": True}


def add_a_network_from_elsewhere(study):
    weights = "results/tiny/models/digits/small_cnn/dense/at/s0.0000/seed0/last.safetensors"
    study["models"] = {
        "given": {"file": weights, "arch": "small_cnn", "dataset": "digits", "objective": "at"}
    }


def attack_the_best_clean_weights(study):
    study["evaluation"]["selections"]["best_clean"] = ["clean"]


REPORTS = {"collect": 1, "figures": 1}
RERUNS = [
    (add_seed, {"train": 5, "evaluate": 10} | REPORTS),
    (add_sparsity, {"train": 4, "evaluate": 8} | REPORTS),
    (add_restart, {"evaluate": 5} | REPORTS),
    (add_attack_to_last, {"evaluate": 5} | REPORTS),
    # Training has not saved these weights, so it runs again; its fingerprint is the same.
    (attack_the_best_clean_weights, {"train": 5, "evaluate": 15} | REPORTS),
    (change_one_method, {"train": 1, "evaluate": 2} | REPORTS),
    (change_the_start_of_the_pruning_methods, {"train": 4, "evaluate": 8} | REPORTS),
    (change_the_threat, {"train": 5, "evaluate": 10} | REPORTS),
    (change_the_machine, {}),
    (say_a_default, {}),
    (change_the_title, {"figures": 1}),
    (remove_a_method, REPORTS),
    (change_a_table, {"figures": 1}),
    (count_the_code, {"train": 5, "evaluate": 10} | REPORTS),
    (add_a_network_from_elsewhere, {"train": 1, "evaluate": 2} | REPORTS),
]


@pytest.mark.parametrize(("change", "jobs"), RERUNS, ids=[c.__name__ for c, _ in RERUNS])
def test_a_change_runs_the_jobs_that_it_concerns(change, jobs, again):
    assert again(change) == jobs


def test_renamed_config_reruns_nothing(again, finished, study):
    finished[0].write(study, "renamed.yaml")
    assert again(lambda study: None, configfile="renamed.yaml") == {}


def test_moved_folder_reruns_nothing(again, finished):
    project, _ = finished
    again(lambda study: None)
    home, away = project.root, project.root.with_name("moved")
    home.rename(away)
    try:
        moved = type(project)(away)
        done = moved.run("snakemake", "-n", "--configfile", STUDY)
    finally:
        away.rename(home)
    assert "Nothing to be done" in done.stdout + done.stderr


def test_changed_caption_redraws_the_figures(again, finished):
    project, _ = finished
    caption = project.root / "report" / "main_table.rst"
    text = caption.read_text()
    caption.write_text(f"{text}\nMore.\n")
    try:
        assert again(lambda study: None) == {"figures": 1}
    finally:
        caption.write_text(text)


def test_one_lost_record_is_made_again_from_the_weights_that_are_there(again, finished):
    project, _ = finished
    record = next(project.root.glob("results/tiny/evaluations/**/bcs/**/best_val.json"))
    kept = record.with_name("kept")
    shutil.move(record, kept)
    try:
        assert again(lambda study: None, "evaluated") == {"evaluate": 1}
    finally:
        shutil.move(kept, record)


# ---------------------------------------------------------------- before anything starts


def test_bad_config_stops_with_one_line_before_anything_starts(study, project):
    study["threat"]["eps"] = 15
    project.write(study)
    for words in (("-n",), ("--cores", "1")):
        done = project.run("snakemake", *words, "--configfile", STUDY)
        assert done.returncode == 2
        lines = [line for line in done.stderr.splitlines() if "profile" not in line]
        assert len(lines) == 1
        assert lines[0].startswith("robsparse: error: config/tiny.yaml: threat.eps = 15: ")
        assert done.stdout == ""
    assert not (project.root / "results").exists()


@pytest.mark.parametrize(
    "words",
    [
        ("--config", "seeds=3"),
        ("--configfile", "config/tiny.yaml", "config/quick.yaml"),
    ],
)
def test_settings_beside_the_study_file_are_refused_not_ignored(words, project):
    done = project.run("snakemake", "-n", *words)
    assert done.returncode == 2
    assert "a study is one complete file" in done.stderr


def test_default_study_is_the_quick_one(project):
    done = project.run("snakemake", "-n")
    assert done.returncode == 0
    assert "results/quick/report.md" in done.stdout + done.stderr
    assert not (project.root / "results").exists()


def test_planning_the_workflow_loads_no_torch(project):
    words = ("-m", "snakemake", "-n", "--configfile", STUDY)
    done = project.run(sys.executable, "-X", "importtime", *words)
    assert done.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "robsparse.schema" in loaded
    assert not loaded & {"torch", "torchvision", "sklearn", "pyautoattack", "matplotlib"}


def test_lint_reports_nothing_but_what_is_meant(project):
    done = project.run("snakemake", "--lint")
    text = done.stdout + done.stderr
    reported = {line.strip() for line in text.splitlines() if line.startswith("    * ")}
    assert reported == {
        "* Specify a conda environment or container for each rule.:",
        # As a parameter, another name of the same study would run everything again.
        "* Shell command directly uses variable STUDY_FILE from outside of the rule:",
    }
    assert not re.search(r"^Lints for (?!rule )", text, re.MULTILINE)


def test_one_broken_cell_does_not_stop_the_others(study, project):
    study["grid"]["methods"] = ["dense", "bcs"]
    study["methods"]["bcs"]["train"] |= {"lr": 1000.0, "momentum": 0.99}
    project.write(study)
    done = project.run("snakemake", "--cores", "2", "trained", "--configfile", STUDY)
    assert done.returncode == 1
    trained = {path.parts[-5] for path in project.root.glob("results/tiny/models/**/training.json")}
    assert trained == {"dense"}
    log = next(project.root.glob("results/tiny/logs/train/**/bcs/**/*.log")).read_text()
    assert "a smaller lr may help" in log
    assert "Traceback" not in log


# Python runs a file of this name at its start. Here it stops `robsparse train` after its first line
# until the other end of the named pipe "held" has been opened and closed.
WAIT_AFTER_THE_FIRST_LINE = """
import builtins, os, sys

def print_and_wait(*words, plain=print, **options):
    plain(*words, **options)
    if os.path.exists("held"):
        open("held").read()

if "train" in sys.orig_argv:
    builtins.print = print_and_wait
"""


def test_killed_snakemake_takes_its_job_with_it_and_the_same_command_goes_on(study, project):
    """SIGKILL: Snakemake can neither stop its job nor remove its lock."""
    study["grid"]["methods"] = ["dense"]
    project.write(study)
    command = ("snakemake", "--cores", "1", "trained", "--configfile", STUDY)
    (project.root / "sitecustomize.py").write_text(WAIT_AFTER_THE_FIRST_LINE)
    held = project.root / "held"
    os.mkfifo(held)
    environment = {"PYTHONPATH": str(project.root)}
    process = project.start(*command, environment=environment)
    with held.open("w"):  # opens when the job opens its end, after its first line
        process.kill()
        process.wait()
        held.unlink()
    key = "digits/small_cnn/dense/at/s0.0000/seed0"
    with filelock.FileLock(project.root / f"results/tiny/resume/{key}/lock"):
        pass  # the job has ended
    process.communicate()
    log = project.root / f"results/tiny/logs/train/{key}.log"
    assert "stopped by SIGTERM" in log.read_text()
    assert list(project.root.glob(".snakemake/locks/*.lock"))
    done = project.run(*command)
    assert done.returncode == 0, done.stderr
    assert "removed the lock of a run that was killed" in done.stderr
    assert log.read_text().startswith(f"resuming {key}")
    assert not list(project.root.glob(".snakemake/locks/*.lock"))


def test_ctrl_c_leaves_nothing_half_written_and_the_same_command_goes_on(study, project):
    study["grid"]["methods"] = ["dense"]
    project.write(study)
    command = ("snakemake", "--cores", "1", "trained", "--configfile", STUDY)
    (project.root / "sitecustomize.py").write_text(WAIT_AFTER_THE_FIRST_LINE)
    held = project.root / "held"
    os.mkfifo(held)
    environment = {"PYTHONPATH": str(project.root)}
    process = project.start(*command, environment=environment, process_group=0)
    with held.open("w"):  # opens when the job opens its end, after its first line
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
        held.unlink()
    process.communicate()
    assert process.returncode != 0
    assert project.files()
    assert all(name.startswith("results/tiny/resume/") for name in project.files())
    done = project.run(*command)
    assert done.returncode == 0, done.stderr
    log = project.root / "results/tiny/logs/train/digits/small_cnn/dense/at/s0.0000/seed0.log"
    assert log.read_text().startswith("resuming digits/small_cnn/dense/at/s0.0000/seed0")
