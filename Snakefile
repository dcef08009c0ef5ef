# Trains, attacks and reports every cell of a study. Rules only call the command `robsparse`.
# To run another study: snakemake --cores N --configfile config/NAME.yaml
from snakemake.utils import min_version

min_version("9.1")


include: "rules/common.smk"
include: "rules/train.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


localrules:
    all,
    trained,
    evaluated,


rule all:
    default_target: True
    input:
        [f"{ROOT}/{name}" for name in (*COLLECTED, *TABLES, *PLOTS, REPORT, PAGE)],


onsuccess:
    print_result()


# After a failure, `--partial` draws the existing results into a separate folder. The next call of
# snakemake runs the failed jobs again.
onerror:
    drawn = shell(
        "unset ROBSPARSE_PARENT;"
        " robsparse collect {STUDY_FILE:q} --partial > /dev/null 2>&1"
        " && robsparse figures {STUDY_FILE:q} --partial || true",
        read=True,
    )
    sys.stdout.write(drawn)
