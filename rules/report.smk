rule collect:
    input:
        rules.evaluated.input,
        rules.trained.input,
    output:
        [f"{ROOT}/{name}" for name in COLLECTED],
    log:
        f"{ROOT}/logs/collect.log",
    resources:
        gpu=0,
    params:
        fingerprint=lambda _: fingerprints.collected(STUDY).plan,
    message:
        "collect the records of {STUDY.study}"
    shell:
        "exec robsparse collect {STUDY_FILE:q} > {log:q} 2>&1"


rule figures:
    input:
        rules.collect.output,
    output:
        tables=report(
            [f"{ROOT}/{name}" for name in TABLES],
            category="Tables",
            caption="../report/main_table.rst",
        ),
        plots=report(
            [f"{ROOT}/{name}" for name in PLOTS],
            category="Plots",
            caption="../report/plots.rst",
        ),
        report=f"{ROOT}/{REPORT}",
    log:
        f"{ROOT}/logs/figures.log",
    resources:
        gpu=0,
    params:
        fingerprint=of_figures,
    message:
        "draw the tables and plots of {STUDY.study}"
    shell:
        "exec robsparse figures {STUDY_FILE:q} > {log:q} 2>&1"
