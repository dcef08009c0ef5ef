"""The command line: exit codes, one-line errors, signals and the lock."""

import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import yaml

from robsparse.cli.main import main
from robsparse.study.cells import Cell, Layout

COMMANDS = ("check", "plan", "train", "evaluate", "collect", "figures")
DENSE = "digits/small_cnn/dense/at/s0.0000/seed0"
BCS = "digits/small_cnn/bcs/at/s0.9000/seed0"
HEAVY = {"torch", "torchvision", "sklearn", "pyautoattack", "matplotlib", "pandas"}
# What no job of an ordinary study uses; each takes 0.1 to 1 s. The compiler of torch needs sympy.
UNUSED = {"torchvision", "robustbench", "sklearn", "scipy", "sympy", "setuptools", "rich"}
UNUSED_BY_JOB = {
    "train": UNUSED | {"pyautoattack", "foolbox", "matplotlib", "pandas"},
    "evaluate": UNUSED | {"foolbox", "matplotlib", "pandas"},
    "collect": UNUSED | {"torch", "matplotlib"},
    "figures": (UNUSED - {"scipy"}) | {"torch"},
}


def shrunk(study):
    """A study whose cells train in a fraction of a second."""
    study["grid"] |= {"methods": ["dense", "bcs"], "seeds": [0]}
    study["datasets"]["digits"] |= {"validation_examples": 300, "test_examples": 800}
    study["methods"]["dense"]["pretrain"]["epochs"] = 2
    study["methods"]["bcs"]["train"]["epochs"] = 2
    study["evaluation"] |= {"n_examples": 10, "selections": {"last": ["clean", "pgd"]}}
    return study


@pytest.fixture
def small(tiny):
    return shrunk(tiny)


@pytest.fixture
def robsparse(project, monkeypatch, capsys):
    """robsparse(*words) -> (exit code, stdout, stderr) of the command run in this process."""
    monkeypatch.chdir(project.root)

    def call(*words):
        code = main(list(words))
        message = capsys.readouterr()
        return code, message.out, message.err

    return call


def assert_one_line(err, *parts):
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("robsparse: error: ")
    for part in parts:
        assert part in lines[0]


# ---------------------------------------------------------------- help


def modules_loaded_by(project, *words):
    done = project.run(sys.executable, "-X", "importtime", *words)
    assert done.returncode == 0, done.stderr
    loaded = {line.rsplit("|", 1)[-1].strip().partition(".")[0] for line in done.stderr.split("\n")}
    assert "argparse" in loaded
    return done.stdout, loaded


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_works_without_loading_torch(command, project):
    words = [command] if command else []
    text, loaded = modules_loaded_by(project, "-m", "robsparse", *words, "--help")
    assert text.startswith(f"usage: robsparse {command}".rstrip())
    assert not loaded & HEAVY


def test_check_loads_no_torch(project):
    text, loaded = modules_loaded_by(project, "-m", "robsparse", "check", "config/tiny.yaml")
    assert text == "config/tiny.yaml: valid, 10 networks to train, 20 evaluations\n"
    assert not loaded & HEAVY


def test_jobs_load_no_library_that_they_do_not_use(project, small):
    """Every job pays for its imports: a hundred small jobs pay a hundred times."""
    small["grid"]["methods"] = ["dense"]
    small["evaluation"]["selections"] = {"last": ["clean", "pgd", "autoattack"]}
    config = project.write(small)
    words = {
        "train": (config, "--cell", DENSE),
        "evaluate": (config, "--cell", DENSE, "--selection", "last"),
        "collect": (config,),
        "figures": (config,),
    }
    for job, unused in UNUSED_BY_JOB.items():
        _, loaded = modules_loaded_by(project, "-m", "robsparse", job, *words[job])
        assert "pydantic" in loaded
        assert ("torch" in loaded) == (job in ("train", "evaluate"))
        assert not loaded & unused, job


def test_installed_command_checks_every_study_of_the_project(project, repository):
    reference = Path("results", "reference")  # of published numbers
    shutil.copytree(repository / reference, project.root / reference)
    for path in sorted(project.root.glob("config/*.yaml")):
        done = project.run("robsparse", "check", str(path))
        assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_ends_early_gets_no_message(project):
    """As in `robsparse list | head -1`."""
    command = project.start("robsparse", "list")
    command.stdout.close()
    assert (command.stderr.read(), command.wait()) == ("", 1)


def test_version_is_printed(project):
    done = project.run("robsparse", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "robsparse")


# ---------------------------------------------------------------- bad configs


def put(data, path, value):
    *parents, last = path.split("/")
    for key in parents:
        data = data[key]
    data[last] = value


WRONG_VALUES = {
    "threat/eps": (8, "threat.eps = 8", "'8/255'"),
    "threat/epsilon": (0.1, "threat.epsilon", "unknown key", "nearest match: 'eps'"),
    "grid/sparsities": ([90], "grid.sparsities.0 = 90", "nearest match: 0.9"),
    "grid/methods": (["dense", "lvm"], "unknown method 'lvm'", "nearest match: 'lwm'"),
    "grid/datasets": (["digit"], "unknown dataset 'digit'", "nearest match: 'digits'"),
    "grid/archs": (["small_cn"], "unknown arch 'small_cn'", "nearest match: 'small_cnn'"),
    "grid/objectives": (["trade"], 'grid.objectives.0 = "trade"', "nearest match: 'trades'"),
    "grid/seeds": ([0, 0], "grid.seeds = [0, 0]", "each entry once"),
    "methods/lwm/finetune/epochs": (0, "methods.lwm.finetune.epochs = 0", "greater than"),
    "methods/lwm/finetune/lr": ("fast", 'methods.lwm.finetune.lr = "fast"', "number"),
    "methods/admm/rho_growth": (0.5, "methods.admm.rho_growth = 0.5", "nearest match: 1"),
    "evaluation/attacks/pdg": ({}, "unknown attack 'pdg'", "nearest match: 'pgd'"),
    "evaluation/selections/last": (["clean", "autoatack"], "nearest match: 'autoattack'"),
    "evaluation/n_examples": (51, "evaluation.n_examples = 51", "nearest match: 50"),
    "evaluation/seed": (None, "evaluation.seed = null", "integer"),
    "machine/device": ("gpu", 'machine.device = "gpu"', "'cuda'"),
    "study": ("../elsewhere", 'study = "../elsewhere"', "expected a name"),
    "title": (3, "title = 3", "string"),
    "methods/dense/pretrain/lr": (float("inf"), "methods.dense.pretrain.lr", "finite"),
    "datasets/digits/validation_examples": (5, "datasets.digits.validation_examples = 5"),
    "evaluation/selections/best_val": (["clean", "pgd", "pgd"], "best_val", "once"),
}


@pytest.mark.parametrize("path", WRONG_VALUES)
def test_check_names_a_wrong_value_and_what_was_expected(path, tiny, project, robsparse):
    value, *expected = WRONG_VALUES[path]
    put(tiny, path, value)
    code, out, err = robsparse("check", project.write(tiny))
    assert (code, out) == (2, "")
    assert_one_line(err, "config/tiny.yaml", *expected)


@pytest.mark.parametrize("section", ["study", "title", "threat", "training", "evaluation"])
def test_check_names_a_missing_section(section, tiny, project, robsparse):
    del tiny[section]
    code, out, err = robsparse("check", project.write(tiny))
    assert (code, out) == (2, "")
    assert_one_line(err, f"config/tiny.yaml: {section}: missing")


NOT_A_STUDY = {
    "empty": b"",
    "list": b"- 1\n",
    "word": b"study\n",
    "tab": b"study: x\n\ttitle: y\n",
    "open bracket": b"study: [1\n",
    "binary": bytes(range(256)),
    "key twice": b"study: a\nstudy: b\n",
    "list as a key": b"? [a, b]\n: 3\n",
    "mapping as a key": b"? {a: b}\n: 3\n",
}


@pytest.mark.parametrize("content", NOT_A_STUDY)
def test_check_refuses_what_is_no_study_in_one_line(content, project, robsparse):
    (project.root / "bad.yaml").write_bytes(NOT_A_STUDY[content])
    code, out, err = robsparse("check", "bad.yaml")
    assert (code, out) == (2, "")
    assert_one_line(err, "bad.yaml")


@pytest.mark.parametrize("name", ["missing.yaml", "config"])
def test_check_says_that_it_cannot_read_a_file(name, robsparse):
    code, _, err = robsparse("check", name)
    assert code == 2
    assert_one_line(err, name, "cannot read")


def test_several_faults_are_one_line_each(tiny, project, robsparse):
    tiny["threat"]["eps"] = 8
    tiny["training"]["batch_size"] = 0
    code, _, err = robsparse("check", project.write(tiny))
    assert code == 2
    assert len(err.splitlines()) == 2


def test_unknown_key_that_is_no_word_gets_a_short_line(tiny, project, robsparse):
    tiny[3] = "x"
    code, _, err = robsparse("check", project.write(tiny))
    assert code == 2
    assert_one_line(err, "3", "unknown key")
    assert len(err) < 300


def test_yaml_merge_keys_work(project, robsparse):
    text = (project.root / "config" / "tiny.yaml").read_text()
    wanted = "finetune: {epochs: 2, lr: 0.05}"
    first, second, third = text.split(wanted)
    merged = f"{first}finetune: &f {{epochs: 2, lr: 0.05}}{second}finetune: {{<<: *f}}{third}"
    assert yaml.safe_load(merged) == yaml.safe_load(text)
    (project.root / "merged.yaml").write_text(merged)
    assert robsparse("check", "merged.yaml")[0] == 0


def test_bad_config_is_one_line_of_the_installed_command_too(tiny, project):
    tiny["threat"]["eps"] = 8
    done = project.run("robsparse", "check", project.write(tiny))
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "threat.eps = 8")


# ---------------------------------------------------------------- bad requests


@pytest.mark.parametrize("command", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (BCS.replace("bcs", "bsc"), f"nearest match: '{BCS}'"),
        (BCS.replace("seed0", "seed7"), "nearest match: 'digits/small_cnn/bcs/at/s0.9000/seed"),
        (BCS.replace("s0.9000", "s0.9500"), "is not part of the study 'tiny'"),
        ("bcs", "expected dataset/arch/method/objective/s0.NNNN/seedN"),
        ("", "expected dataset/arch/method/objective/s0.NNNN/seedN"),
    ],
)
def test_unknown_cell_gets_the_nearest_match(command, cell, expected, project, robsparse):
    code, _, err = robsparse(command, "config/tiny.yaml", "--cell", cell)
    assert code == 2
    assert_one_line(err, expected)
    assert project.files() == {}


def test_train_says_which_cell_to_train_first(project, robsparse):
    cell = BCS.replace("bcs", "lwm")
    code, _, err = robsparse("train", "config/tiny.yaml", "--cell", cell)
    assert code == 2
    assert_one_line(err, f"train --cell {DENSE} first")
    assert project.files() == {}


@pytest.mark.parametrize("threads", ["-1", "0", "many"])
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_impossible_threads_are_refused(command, threads, project, robsparse):
    with pytest.raises(SystemExit) as refused:
        robsparse(command, "config/tiny.yaml", "--cell", DENSE, "--threads", threads)
    assert refused.value.code == 2
    assert project.files() == {}


def test_plan_ends_with_the_command_that_runs_the_study(small, project, robsparse):
    study = project.write(small)
    code, out, _ = robsparse("plan", study, "--cores", "3")
    assert code == 0
    assert out.splitlines()[-1] == f"start it: robsparse run {study} --cores 3"


@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_cuda_without_a_gpu_is_refused(command, small, project, robsparse):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    small["machine"]["device"] = "cuda"
    words = {
        "train": ("--cell", DENSE),
        "evaluate": ("--cell", DENSE, "--selection", "last"),
        "plan": (),
    }
    code, _, err = robsparse(command, project.write(small), *words[command])
    assert code == 2
    assert_one_line(err, "device 'cuda'")
    assert project.files() == {}


def test_results_folder_that_is_a_file_is_refused(small, project, robsparse):
    (project.root / "taken").write_text("x")
    code, _, err = robsparse("train", project.write(small), "--cell", DENSE, "--results", "taken")
    assert code == 2
    assert_one_line(err, "taken", "cannot write")


@pytest.mark.parametrize("command", ["collect", "figures"])
def test_nothing_to_collect_or_draw_is_one_line(command, project, robsparse):
    code, _, err = robsparse(command, "config/tiny.yaml")
    assert code == 2
    assert_one_line(err, "results/tiny")
    assert project.files() == {}


def test_training_that_overflows_is_a_failure_that_leaves_a_note_alone(small, project, robsparse):
    small["methods"]["dense"]["pretrain"] |= {"lr": 1000.0, "momentum": 0.99}
    code, _, err = robsparse("train", project.write(small), "--cell", DENSE)
    assert code == 1
    assert_one_line(err, DENSE, "stage pretrain", "smaller lr")
    [(name, note)] = project.files().items()
    assert name == f"results/tiny/failed/{DENSE}.txt"
    assert f"robsparse: error: {note.decode()}" == err


# ---------------------------------------------------------------- damaged models


def truncated(good):
    return good[: len(good) // 2]


def with_entries(change):
    def damage(good):
        state = safetensors.numpy.load(good)
        change(state)
        return safetensors.numpy.save(state)

    return damage


def rename(state):
    state["other"] = state.pop("0.weight")


def reshape(state):
    state["0.weight"] = state["0.weight"].reshape(1, -1)


def poison(state):
    state["0.weight"].flat[3] = np.nan


DAMAGES = {
    "missing": (None, "no such model file"),
    "empty": (lambda good: b"", "not a readable file of weights"),
    "garbage": (lambda good: b"garbage" * 100, "not a readable file of weights"),
    "truncated": (truncated, "not a readable file of weights"),
    "entry renamed": (with_entries(rename), "'0.weight' are missing"),
    "entry added": (with_entries(lambda s: s.update(x=np.ones(1))), "unexpected weights 'x'"),
    "other shape": (with_entries(reshape), "has shape"),
    "nan": (with_entries(poison), "NaN"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_evaluate_refuses_a_damaged_model_and_writes_nothing(damage, small, project, robsparse):
    study = project.write(small)
    assert robsparse("train", study, "--cell", DENSE)[0] == 0
    path = Layout(project.root / "results" / "tiny").model(Cell.parse(DENSE), "last")
    change, expected = DAMAGES[damage]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    before = project.files()
    for words in ((), ("--model", str(path))):
        code, out, err = robsparse(
            "evaluate", study, "--cell", DENSE, "--selection", "last", *words
        )
        assert (code, out) == (2, "")
        assert_one_line(err, path.name, expected)
    assert project.files() == before


def test_model_of_another_suite_is_evaluated_beside_its_file(small, project, robsparse):
    study = project.write(small)
    robsparse("train", study, "--cell", DENSE)
    ours = Layout(project.root / "results" / "tiny").model(Cell.parse(DENSE), "last")
    theirs = project.root / "elsewhere" / "net.safetensors"
    theirs.parent.mkdir()
    ours.rename(theirs)
    before = results_of(project)
    words = ("evaluate", study, "--cell", DENSE, "--selection", "last", "--model", str(theirs))
    assert robsparse(*words)[0] == 0
    assert results_of(project) == before
    rows = json.loads((theirs.parent / "net.safetensors.Linf-0.15.evaluation.json").read_text())[
        "rows"
    ]
    assert [row["attack"] for row in rows] == ["clean", "pgd"]
    assert rows[0]["train_seconds"] is None


def test_selection_that_the_study_does_not_have_is_refused(small, project, robsparse):
    study = project.write(small)
    code, _, err = robsparse("evaluate", study, "--cell", DENSE, "--selection", "best_val")
    assert code == 2
    assert_one_line(err, "best_val")


def test_stale_record_is_not_collected(small, project, robsparse):
    study = project.write(small)
    robsparse("train", study, "--cell", DENSE)
    robsparse("evaluate", study, "--cell", DENSE, "--selection", "last")
    small["threat"]["eps"] = 0.2
    project.write(small)
    before = project.files()
    code, _, err = robsparse("collect", study)
    assert code == 2
    assert_one_line(err, "other settings")
    assert project.files() == before


# ---------------------------------------------------------------- signals


SMALL_PIPE = 4096  # bytes: the least that Linux allows


def lengthened(study):
    """The dense network prints a line an epoch, together more than `SMALL_PIPE` holds."""
    study["methods"]["dense"]["pretrain"]["epochs"] = 100
    return study


@pytest.fixture
def long(small, project):
    """Name of the study file of a long run."""
    return project.write(lengthened(small))


@pytest.fixture(scope="module")
def uninterrupted(repository, project_at, tmp_path_factory):
    """Weights of the run that is never stopped."""
    project = project_at(tmp_path_factory.mktemp("whole") / "project")
    study = yaml.safe_load((repository / "config" / "tiny.yaml").read_text())
    name = project.root / project.write(lengthened(shrunk(study)))
    results = project.root / "results"
    assert main(["train", str(name), "--cell", DENSE, "--results", str(results)]) == 0
    return weights_of(project)


def results_of(project):
    """All files but the finished parts that a later evaluation goes on from."""
    return {k: v for k, v in project.files().items() if "/resume/evaluations/" not in str(k)}


def weights_of(project):
    cell, layout = Cell.parse(DENSE), Layout(project.root / "results" / "tiny")
    return [layout.model(cell, selection).read_bytes() for selection in ("best_val", "last")]


def started(project, long):
    """A training run in another process that has printed its first line.

    It waits when the pipe is full. So it cannot end before this process sends its signal, however
    busy the machine is.
    """
    process = project.start("robsparse", "train", long, "--cell", DENSE, pipesize=SMALL_PIPE)
    line = process.stdout.readline()
    assert line.startswith("pretrain epoch"), process.communicate()[1]
    return process


def stop(process, signum):
    process.send_signal(signum)
    _, err = process.communicate()
    return process.returncode, err


def assert_only_a_checkpoint(project):
    names = [name for name in project.files() if name.startswith("results/")]
    assert names
    assert all(name.startswith("results/tiny/resume/") for name in names)
    assert all(name.endswith(("state.pt", "state.previous.pt")) for name in names)


def test_ctrl_c_exits_130_and_the_same_command_continues(long, uninterrupted, project, robsparse):
    code, err = stop(started(project, long), signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert "SIGINT" in err
    assert_only_a_checkpoint(project)
    code, out, _ = robsparse("train", long, "--cell", DENSE)
    assert code == 0
    assert out.startswith(f"resuming {DENSE}")
    assert weights_of(project) == uninterrupted


def test_running_job_locks_out_a_copy_and_exits_75_when_terminated(
    long, uninterrupted, project, robsparse
):
    process = started(project, long)
    code, out, err = robsparse("train", long, "--cell", DENSE)
    assert process.poll() is None, "the first run ended too early for this test"
    assert (code, out) == (2, "")
    assert_one_line(err, "another process is running the same job")
    code, err = stop(process, signal.SIGTERM)
    assert code == 75
    assert "Traceback" not in err
    assert_only_a_checkpoint(project)
    assert robsparse("train", long, "--cell", DENSE)[0] == 0
    assert weights_of(project) == uninterrupted


def test_killed_run_leaves_nothing_half_written_and_starts_again(
    long, uninterrupted, project, robsparse
):
    code, _ = stop(started(project, long), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert project.files() == {}
    assert robsparse("train", long, "--cell", DENSE)[0] == 0
    assert weights_of(project) == uninterrupted


def test_ctrl_c_in_an_evaluation_leaves_no_record(small, project, robsparse):
    small["methods"]["dense"]["pretrain"]["epochs"] = 20
    small["threat"]["eps"] = small["training"]["crafting"]["step_size"] = 0.001
    small["evaluation"]["attacks"]["pgd"] = {"steps": 5000, "restarts": 50}
    study = project.write(small)
    robsparse("train", study, "--cell", DENSE)
    before = results_of(project)
    words = ("robsparse", "evaluate", study, "--cell", DENSE, "--selection", "last")
    process = project.start(*words)
    assert process.stdout.readline().startswith("clean:")
    code, err = stop(process, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert results_of(project) == before
