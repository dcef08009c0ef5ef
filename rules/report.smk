rule collect:
    input:
        rules.evaluated.input,
        rules.trained.input,
    output:
        csv=f"{ROOT}/results.csv",
        parquet=f"{ROOT}/results.parquet",
        layers=f"{ROOT}/layers.csv",
        curves=f"{ROOT}/curves.csv",
        steps=f"{ROOT}/steps.parquet",
        lifetimes=f"{ROOT}/lifetimes.parquet",
        magnitudes=f"{ROOT}/weights.csv",
        overlap=f"{ROOT}/overlap.csv",
        doubts=f"{ROOT}/doubts.csv",
        failures=f"{ROOT}/failures.csv",
    log:
        f"{ROOT}/logs/collect.log",
    params:
        study=STUDY_FILE,
    message:
        "collect the records of {STUDY.study}"
    shell:
        "robsparse collect {params.study:q} > {log:q} 2>&1"


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
    params:
        study=STUDY_FILE,
        printed=f"{STUDY.title} {STUDY.small} {STUDY.tables}",
    message:
        "draw the tables and plots of {STUDY.study}"
    shell:
        "robsparse figures {params.study:q} > {log:q} 2>&1"
