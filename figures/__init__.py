"""Tables and plots, drawn from the collected tidy files alone; nothing here loads torch."""

# What `robsparse figures` writes under results/<study>, for the workflow to declare.
TABLES = tuple(f"tables/{name}" for name in ("main.md", "main.tex", "main.csv"))
PLOTS = tuple(
    f"plots/{name}.{suffix}"
    for name in ("robust_accuracy", "live_weights", "layer_density", "rewiring")
    for suffix in ("png", "pdf")
)
REPORT = "report.md"
