"""Tests of the resources that jobs request, on this machine and on a cluster."""

import re

import pytest

STUDY = "config/tiny.yaml"
SLURM = ("--executor", "slurm", "--jobs", "50")


@pytest.fixture
def requested(project, tiny):
    """requested(machine, *words) -> {rule: the resources that a job requests}, from a dry run."""
    for path in (project.root / "rules").glob("*.smk"):  # with a message no resource is printed
        path.write_text(re.sub(r"    message:\n.*\n", "", path.read_text()))
    (project.root / "profiles/default/config.yaml").write_text("keep-going: true\n")

    def resources(machine, *words, **environment):
        tiny["grid"] |= {"methods": ["dense"], "seeds": [0]}
        tiny["machine"] = machine
        project.write(tiny)
        done = project.run("snakemake", "-n", *words, "--configfile", STUDY, **environment)
        assert done.returncode == 0, done.stderr
        jobs = re.findall(r"rule (\w+):.*?resources: ([^\n]*)", done.stdout + done.stderr, re.S)
        return {rule: dict(re.findall(r"(\w+)=([^,]+)", text)) for rule, text in jobs}

    return resources


@pytest.mark.parametrize(
    ("device", "visible", "words", "gpu"),
    [
        ("cpu", "0,1", (), "0"),
        ("cuda", "", (), "1"),
        ("auto", "", (), "0"),
        ("auto", "0,1", (), "1"),
        # The machine that submits has no GPU; the profile knows what the cluster has.
        ("auto", "", (*SLURM, "--default-resources", "gpu=1"), "1"),
        ("auto", "0,1", SLURM, None),
        ("cpu", "", (*SLURM, "--default-resources", "gpu=1"), "0"),
        ("cuda", "", SLURM, "1"),
    ],
)
def test_jobs_request_the_gpus_that_they_use(device, visible, words, gpu, requested):
    found = requested({"device": device}, *words, CUDA_VISIBLE_DEVICES=visible)
    assert [found[rule].get("gpu") for rule in ("train", "evaluate")] == [gpu, gpu]
    assert [found[rule]["gpu"] for rule in ("collect", "figures")] == ["0", "0"]


def test_memory_and_time_grow_with_the_attempt(requested):
    machine = {"memory_mb": 300, "minutes": 7}
    for attempt in (1, 3):
        found = requested(machine, "--attempt", str(attempt))
        for rule in ("train", "evaluate"):
            assert found[rule]["mem_mb"] == str(300 * attempt)
            assert found[rule]["runtime"] == str(7 * attempt)


def test_jobs_on_this_machine_share_its_gpus(project, tiny):
    tiny["grid"] |= {"methods": ["dense"], "seeds": [0]}
    tiny["methods"]["dense"]["pretrain"]["epochs"] = 1
    tiny["machine"] = {"device": "auto", "jobs_per_gpu": 3}
    project.write(tiny)
    words = ("snakemake", "--cores", "1", "trained", "--quiet", "rules", "--configfile", STUDY)
    done = project.run(*words, CUDA_VISIBLE_DEVICES="4,7", TMPDIR=str(project.root))
    assert done.returncode == 0, done.stderr
    assert re.search(r"^Provided resources: gpu\D+6\b", done.stdout + done.stderr, re.M)
    [log] = project.root.glob("results/tiny/logs/train/**/*.log")
    assert log.read_text().startswith("GPU 4 of 4, 7\n")


def test_profile_of_slurm_requests_what_the_study_says(requested):
    words = ("--profile", "profiles/slurm")
    found = requested({"device": "auto", "memory_mb": 300, "minutes": 7}, *words)
    for rule in ("train", "evaluate"):
        assert {key: found[rule][key] for key in ("gpu", "mem_mb", "runtime")} == {
            "gpu": "1",
            "mem_mb": "300",
            "runtime": "7",
        }
    assert found["collect"]["slurm_partition"] == "main"
    assert found["collect"]["gpu"] == "0"
