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
        tables=[
            report(
                f"{ROOT}/{name}",
                category="Tables",
                caption="../report/main_table.rst",
                labels={"table": Path(name).stem, "format": Path(name).suffix[1:]},
            )
            for name in TABLES
        ],
        plots=[
            report(
                f"{ROOT}/{name}",
                category="Plots",
                caption="../report/plots.rst",
                labels=labels_of_plot(name),
            )
            for name in PLOTS
        ],
        report=f"{ROOT}/{REPORT}",
        page=report(
            f"{ROOT}/{PAGE}",
            category="Page",
            caption="../report/page.rst",
            labels={"page": STUDY.study},
        ),
    log:
        f"{ROOT}/logs/figures.log",
    resources:
        gpu=0,
    params:
        fingerprint=of_figures,
    message:
        "draw the tables, plots and page of {STUDY.study}"
    shell:
        "exec robsparse figures {STUDY_FILE:q} > {log:q} 2>&1"
