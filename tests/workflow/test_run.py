"""`robsparse run`: the same effect as snakemake, the errors of failed jobs, a part, a stop."""

import os
import signal

import pytest
import yaml

BAD = "digits/small_cnn/bad/at/s0.5000/seed0"
DENSE = "digits/small_cnn/dense/at/s0.0000/seed0"


def shrunk(study):
    """A dense network, and an external one with a file that is no file of weights."""
    study["grid"] |= {"methods": ["dense"], "seeds": [0]}
    study["datasets"]["digits"] |= {"validation_examples": 300, "test_examples": 800}
    study["methods"]["dense"]["pretrain"]["epochs"] = 1
    study["evaluation"] |= {"n_examples": 10, "selections": {"last": ["clean", "pgd"]}}
    common = {"arch": "small_cnn", "dataset": "digits", "objective": "at", "sparsity": 0.5}
    study["models"] = {"bad": common | {"file": "bad.safetensors"}}
    return study


@pytest.fixture(scope="module")
def failed(repository, project_at, tmp_path_factory):
    """A project after `robsparse run`, in which one network failed."""
    project = project_at(tmp_path_factory.mktemp("run") / "project")
    project.write(shrunk(yaml.safe_load((repository / "config" / "tiny.yaml").read_text())))
    (project.root / "bad.safetensors").write_bytes(b"no weights")
    return project, project.run("robsparse", "run", "config/tiny.yaml", "--cores", "1")


def test_a_failed_network_is_named_with_its_own_error_and_its_log(failed):
    project, done = failed
    assert done.returncode == 1
    assert "exit status" not in done.stdout + done.stderr
    text = done.stdout
    assert text.startswith("1 job failed:\n")
    assert f"  train {BAD}: bad.safetensors: damaged, not a readable file of weights" in text
    log = f"results/tiny/logs/train/{BAD}.log"
    assert f"    log: {log}" in text
    assert (project.root / log).exists()
    assert "look at: results/tiny/partial/report.html" in text


def test_without_a_terminal_each_job_is_one_line(failed):
    _, done = failed
    lines = [line for line in done.stderr.splitlines() if line.startswith(("train ", "attack "))]
    assert [line.split(":")[0] for line in lines] == [f"train {DENSE}", f"attack {DENSE} (last)"]
    assert "robust" in lines[0]
    assert lines[1].split(", pgd ")[1].startswith(("0.0 %", "10.0 %", "20.0 %", "30.0 %", "40.0 %"))
    assert "[1 of 2 networks trained, 1 of 2 attacked, 1 failed" in lines[1]


def test_snakemake_finds_the_same_jobs_done_and_left(failed):
    project, _ = failed
    done = project.run("snakemake", "-n", "--configfile", "config/tiny.yaml")
    text = done.stdout + done.stderr
    assert f"train {BAD}" in text
    assert f"train {DENSE}" not in text
    assert f"attack {DENSE}" not in text


def test_a_part_of_the_study_is_run_and_drawn_apart(failed):
    project, _ = failed
    words = ("--only", "method=dense", "--cores", "1")
    done = project.run("robsparse", "run", "config/tiny.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "look at: results/tiny/partial/report.html" in done.stdout
    assert not (project.root / "results/tiny/results.csv").exists()


def test_a_changed_study_is_a_file_that_runs_to_its_table(failed):
    project, _ = failed
    words = ("--set", "models={}", "--set", "study=other", "--set", "evaluation.n_examples=4")
    done = project.run("robsparse", "run", "config/tiny.yaml", *words, "--cores", "1")
    assert done.returncode == 0, done.stderr
    table = (project.root / "results/other/tables/main.md").read_text()
    assert table in done.stdout
    assert "look at: results/other/report.html" in done.stdout
    written = project.root / "results/other/config.yaml"
    assert yaml.safe_load(written.read_text())["evaluation"]["n_examples"] == 4
    again = project.run("robsparse", "run", "results/other/config.yaml", "--cores", "1")
    assert again.returncode == 0
    assert again.stdout.startswith("nothing to do")


WRONG = {
    "a wrong value": (("--set", "threat.eps=15"), "threat.eps = 15"),
    "a wrong key": (("--set", "evaluation.examples=5"), "unknown key"),
    "a wrong choice": (("--only", "method=bsc"), "no method 'bsc'"),
    "no cores": (("--cores", "none"), "expected a whole number"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_option_starts_nothing(what, project, repository):
    words, message = WRONG[what]
    done = project.run("robsparse", "run", "config/tiny.yaml", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (project.root / "results").exists()


def test_outside_the_repository_the_command_says_where_it_runs(project):
    (project.root / "Snakefile").unlink()
    done = project.run("robsparse", "run", "config/tiny.yaml")
    assert (done.returncode, "folder of the repository" in done.stderr) == (2, True)


def test_further_options_go_to_snakemake(project):
    done = project.run("robsparse", "run", "config/tiny.yaml", "--", "--no-such-option")
    assert done.returncode == 2
    assert "--no-such-option" in done.stderr


def test_a_stopped_run_says_how_to_continue_and_continues(project, tiny):
    tiny = shrunk(tiny)
    del tiny["models"]
    tiny["methods"]["dense"]["pretrain"]["epochs"] = 200
    project.write(tiny)
    words = ("robsparse", "run", "config/tiny.yaml", "--cores", "1")
    running = project.start(*words, start_new_session=True)
    log = project.root / f"results/tiny/logs/train/{DENSE}.log"
    while not (log.exists() and "epoch" in log.read_text()):
        assert running.poll() is None, running.stderr.read()
    os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate()
    assert running.returncode == 130, err
    assert "stopped: 0 of 1 networks trained" in out
    assert "the same command continues" in out
    assert list(project.root.glob(f"results/tiny/resume/{DENSE}/state*.pt"))
