"""Loads a network of RobustBench's model zoo by name; it is downloaded on first use."""

import contextlib
import importlib
import io
from typing import Any

from torch import nn

from robsparse.base.errors import UsageError, in_a_line, nearest
from robsparse.thirdparty.robustbench_repair import import_robustbench

FOLDER = "data/robustbench"  # where downloads are kept


def load(name: str, dataset: str, norm: str) -> nn.Module:
    """The network as the zoo has it, in eval mode; it takes images in [0,1].

    Raises UsageError when the extra is not installed, when the zoo has no such name for the data
    set and norm, or when the download fails.
    """
    import_robustbench()
    found = importlib.import_module("robustbench.model_zoo").model_dicts
    enums = importlib.import_module("robustbench.model_zoo.enums")
    load_model = importlib.import_module("robustbench.utils").load_model
    try:
        known: dict[str, Any] = found[enums.BenchmarkDataset(dataset)][enums.ThreatModel(norm)]
    except (KeyError, ValueError):
        raise UsageError(f"RobustBench's zoo has no networks for {dataset} under {norm}") from None
    if name not in known:
        raise UsageError(
            f"RobustBench's zoo has no '{name}' for {dataset} under {norm}{nearest(name, known)}"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model = load_model(name, model_dir=FOLDER, dataset=dataset, threat_model=norm)
    except (Exception, SystemExit) as error:  # whatever its downloader meets without a network
        raise UsageError(
            f"{name}: RobustBench could not fetch it ({in_a_line(error)}); expected a "
            f"network connection, or the file under {FOLDER}/{dataset}/{norm}"
        ) from None
    return model.eval()
