import os
import sys
from pathlib import Path
from shlex import quote
from typing import get_args

from robsparse.records.columns import COLLECTED
from robsparse.schema.evaluation import Selection
from robsparse.study import fingerprints
from robsparse.study.cells import Cell, Layout
from robsparse.study.loading import load
from robsparse.base import gpus
from robsparse.base.errors import RunError, UsageError
from robsparse.base.runs import begin_run
from robsparse.figures import PAGE, REPORT, SUFFIXES, plots_of, tables_of

# A study is one file, so this is the configfile of the command line and not the merged `config`.
# The file name is not a parameter of a rule: only the content decides what runs again.
STUDY_FILE = os.path.relpath((workflow.configfiles or ["config/quick.yaml"])[0])

# True in the run that submits jobs to a cluster, and in those jobs.
CLUSTER = workflow.nodes is not None or not workflow.is_main_process

# Jobs use the `robsparse` of this Python, even if its environment is not activated. They end with
# this process; therefore rules call `exec robsparse`, with no shell in between.
JOB_ENVIRONMENT = {
    "PATH": f"{quote(str(Path(sys.executable).parent))}:$PATH",
    "ROBSPARSE_PARENT": "$PPID",
}
if CLUSTER:
    # All nodes choose the same forms of convolutions, so a job may continue on another one.
    costs = os.environ.get("ROBSPARSE_COSTS", "estimated")
    JOB_ENVIRONMENT["ROBSPARSE_COSTS"] = quote(costs)
shell.prefix(f"export {' '.join(f'{k}={v}' for k, v in JOB_ENVIRONMENT.items())}; ")


def or_end(function, *arguments):
    """Call a function. An error ends Snakemake with one line and the exit code of `robsparse`."""
    try:
        return function(*arguments)
    except (UsageError, RunError) as error:
        sys.stderr.write(f"robsparse: error: {error}\n")
        sys.exit(2 if isinstance(error, UsageError) else 1)


def load_study():
    settings = workflow.config_settings
    if settings.config or len(settings.configfiles) > 1:
        raise UsageError(
            "a study is one complete file: expected one --configfile and no --config "
            "(change a copy of the file; write targets before --configfile)"
        )
    return load(STUDY_FILE)


if workflow.is_main_process:
    RUN = or_end(begin_run, Path(".snakemake"))
STUDY = or_end(load_study)
ROOT = f"results/{STUDY.study}"
LAYOUT = Layout(Path(ROOT))
TABLES = tables_of(STUDY)
PLOTS = plots_of(STUDY)
CELL = "{dataset}/{arch}/{method}/{objective}/s{sparsity}/seed{seed}"


wildcard_constraints:
    dataset=r"[^/]+",
    arch=r"[^/]+",
    method=r"[^/]+",
    objective=r"[^/]+",
    sparsity=r"0\.\d{4}",
    seed=r"\d+",
    selection="|".join(get_args(Selection)),


def cell_of(wildcards):
    return Cell.parse(CELL.format(**wildcards))


def inputs_of_training(wildcards):
    return [str(path) for path in STUDY.inputs(cell_of(wildcards), LAYOUT)]


def surrogate_weights(wildcards):
    cells = STUDY.surrogates(cell_of(wildcards), wildcards.selection)
    return [str(LAYOUT.model(cell, wildcards.selection)) for cell in cells]


def of_training(wildcards):
    return fingerprints.training(STUDY, cell_of(wildcards)).plan


def of_evaluation(wildcards):
    return fingerprints.evaluation(STUDY, cell_of(wildcards), wildcards.selection).plan


def of_figures(wildcards):
    captions = sorted(Path(workflow.basedir, "report").glob("*.rst"))
    return fingerprints.figures(STUDY, captions).plan


def gpu_of_job():
    """Return the number of GPUs that a job requests, as a resource of a rule.

    `device: auto` uses a GPU of this machine if there is one. What a cluster has is not known here:
    a job gets the number in `default-resources` of the profile.
    """
    if CLUSTER and STUDY.machine.device == "auto":
        return {}
    wanted = {"cpu": False, "cuda": True, "auto": bool(gpus.visible())}
    return {"gpu": int(wanted[STUDY.machine.device])}


# Jobs on this machine share its GPUs; `--resources gpu=N` changes the number. The scope is local:
# jobs that are submitted to a cluster do not wait for each other, and a group of jobs that is
# submitted together uses one GPU.
resource_scopes:
    gpu="local",


if "gpu" not in workflow.global_resources:
    places = 1 if CLUSTER else len(gpus.visible()) * STUDY.machine.jobs_per_gpu
    workflow.register_resource("gpu", max(1, places))


def labels_of_plot(name):
    """Labels of a plot in the report of Snakemake: its name, and the size of its file."""
    file = Path(name).name
    [suffix] = [end for end in SUFFIXES if file.endswith(end)]
    sizes = dict(zip(SUFFIXES, ("screen", "column", "page", "caption"), strict=True))
    return {"plot": file.removesuffix(suffix).replace("_", " "), "file": sizes[suffix]}


def print_result():
    table = Path(ROOT, TABLES[0])
    if table.exists():
        sys.stdout.write(
            f"{table.read_text()}\nReport: {ROOT}/{REPORT}\nPage: {ROOT}/{PAGE}\n"
        )
