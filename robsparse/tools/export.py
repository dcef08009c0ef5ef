"""Writes a network for use outside a study: a compact file, ONNX, an entry of RobustBench."""

import importlib.util
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from robsparse import datasets
from robsparse.base.counts import keep_count
from robsparse.base.errors import RunError, UsageError
from robsparse.base.files import atomic, file_checksum, read_tensors, write_json
from robsparse.fast import proof
from robsparse.figures.text.formats import radius
from robsparse.networks import compact, construct, external
from robsparse.records.evaluation_record import read_record
from robsparse.records.training_record import read_training
from robsparse.schema.evaluation import Selection
from robsparse.study.cells import Cell, Layout
from robsparse.study.study import Study

_ONNX = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """One saved network of a study, and the folder of its exported files."""

    study: Study
    cell: Cell
    selection: Selection
    layout: Layout

    def path(self, end: str) -> Path:
        """Return the path of an exported file."""
        return self.layout.root / "export" / self.cell.key / f"{self.selection}.{end}"

    def load(self) -> tuple[nn.Module, datasets.Splits]:
        """Return the network in eval mode, and its data set."""
        study, cell = self.study, self.cell
        splits = datasets.load(study.base("dataset", cell.dataset), study.datasets[cell.dataset])
        network, _ = external.load_network(study, cell, splits, self.layout, self.selection)
        return network.eval(), splits


def export(one: Exported, formats: list[str]) -> list[str]:
    """Write a network in these formats; return a line for each file.

    Args:
        one: the network.
        formats: names of FORMATS. If it is empty: compact, and onnx if its libraries are installed.

    Raises:
        UsageError: if the weights are missing or damaged, or if a format cannot hold this network.
        RunError: if the ONNX file gives other logits than the network.
    """
    if formats:
        return [line for name in formats for line in FORMATS[name](one)]
    try:
        require_onnx()
    except UsageError as error:
        return [*compact_file(one), f"no ONNX file: {error}"]
    return [*compact_file(one), *onnx_file(one)]


# ---------------------------------------------------------------- compact


def compact_file(one: Exported) -> list[str]:
    """Write the compact file (`robsparse.networks.compact`), which `robsparse.load` opens.

    Raises:
        UsageError: if foreign code builds the network. The file could not build it again.
    """
    study, cell = one.study, one.cell
    source = study.source(cell.method)
    if source.foreign:
        raise UsageError(
            f"{cell.key}: {source} builds this network, expected an arch of this suite for a "
            "compact file"
        )
    network, splits = one.load()
    state, path = network.state_dict(), one.path("compact.safetensors")
    compact.write(
        path,
        state,
        arch=study.base("arch", cell.arch),
        arch_params=construct.arch_params(study, cell).model_dump(mode="json"),
        dataset=study.base("dataset", cell.dataset),
        image_shape=splits.image_shape,
        classes=splits.classes,
        provenance=_provenance(one),
    )
    whole = sum(value.nbytes for value in state.values())
    return [f"{path}: {compact.size(state):,} bytes of tensors, {whole:,} with all zeros"]


def _provenance(one: Exported) -> dict[str, str]:
    """Return where the weights come from: the network, and what its training record says."""
    trained = read_training(one.layout.training(one.cell))
    kept = ("settings_digest", "code_version", "code_digest", "libraries", "data_checksum")
    return {
        "study": one.study.study,
        "cell": one.cell.key,
        "selection": one.selection,
        "model_checksum": file_checksum(one.layout.model(one.cell, one.selection)),
        **{name: trained[name] for name in kept if name in trained},
    }


# ---------------------------------------------------------------- ONNX


def onnx_file(one: Exported) -> list[str]:
    """Write the network as ONNX with all weights, and batch norm folded into convolutions.

    The input `images` is x_NCHW in [0,1] with any N, the output `logits` is logits_NK. The file
    is compared with the network on test images in onnxruntime.

    Raises:
        UsageError: if the libraries are not installed.
        RunError: if the logits differ by more than rounding. No file is written then.
    """
    require_onnx()
    network, splits = one.load()
    path, images = one.path("onnx"), splits.test.x_NCHW[: proof.IMAGES].contiguous()
    with atomic(path) as temporary:
        write_onnx(network, images, temporary)
        with torch.no_grad():
            plain = proof.Passes(network(images), None)
        if reason := proof.difference(plain, proof.Passes(onnx_session(temporary)(images), None)):
            raise RunError(f"{path}: onnxruntime gives other logits than the network ({reason})")
    return [f"{path}: equal to the network on {len(images)} test images in onnxruntime"]


def write_onnx(network: nn.Module, images_NCHW: Tensor, path: Path) -> None:
    """Write a network in eval mode as ONNX in one file. images_NCHW: at least two images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, about their own future
        program = torch.onnx.export(
            network,
            (images_NCHW,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("N")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(str(path), external_data=False)


def onnx_session(path: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """Return an ONNX file as a function in onnxruntime on the CPU: x_NCHW -> logits_NK."""
    import onnxruntime  # noqa: PLC0415 (an optional library)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda x_NCHW: torch.from_numpy(session.run(None, {"images": x_NCHW.numpy()})[0])


def require_onnx() -> None:
    """Raise UsageError unless the libraries of the ONNX format are installed."""
    absent = [name for name in _ONNX if importlib.util.find_spec(name) is None]
    if absent:
        raise UsageError(f"{', '.join(absent)} not installed; pip install 'robsparse[onnx]'")


# ---------------------------------------------------------------- RobustBench


def robustbench_entry(one: Exported) -> list[str]:
    """Write the model_info of RobustBench, and the weights beside it.

    Raises:
        UsageError: if the network was not attacked with the complete standard AutoAttack, or if an
            older version of robsparse wrote the weights.
    """
    info = model_info(one)
    return [f"{info}: fill in link, name, authors and venue", f"{copy_weights(one)}: the weights"]


def model_info(one: Exported) -> Path:
    """Write the model_info of an attacked network; return its path.

    link, name, authors and venue are null; fill them in before you submit the entry.

    Raises:
        UsageError: if the network was not attacked with the complete standard AutoAttack.
    """
    study, cell, selection, layout = one.study, one.cell, one.selection, one.layout
    record = read_record(layout.evaluation(cell, selection))
    whole = {row.attack: row for row in record.rows if row.component == "all"}
    if "autoattack" not in whole:
        raise UsageError(
            f"{layout.evaluation(cell, selection)}: RobustBench expects an AutoAttack accuracy"
        )
    row = whole["autoattack"]
    if row.version != "standard":
        raise UsageError(
            f"{layout.evaluation(cell, selection)}: AutoAttack version = {row.version}: expected "
            "standard, which RobustBench's accuracies are of"
        )
    label = study.label("method", cell.method)
    path = one.path("model_info.json")
    write_json(
        path,
        {
            "link": None,
            "name": None,
            "authors": None,
            "additional_data": cell.objective == "rst",
            "number_forward_passes": 1,
            "dataset": study.base("dataset", cell.dataset),
            "venue": None,
            "architecture": study.label("arch", cell.arch),
            "eps": radius(row.eps),
            "clean_acc": _percent(whole["clean"].accuracy),
            "reported": _percent(row.accuracy),
            "autoattack_acc": _percent(row.accuracy),
            "unreliable": bool(row.potentially_unreliable),
            "footnote": f"{label}, sparsity {row.sparsity_reached:.4f} ({row.nonzero} of "
            f"{row.prunable} weights, {keep_count(row.prunable, cell.sparsity)} asked), "
            f"objective {cell.objective}, seed {cell.seed}, selection {selection}, first "
            f"{row.n_examples} test images, robsparse {row.code_version}",
        },
    )
    return path


def copy_weights(one: Exported) -> Path:
    """Copy a network's weights (safetensors) to the folder of its model_info; return the path.

    Raises:
        UsageError: if an older version of robsparse wrote the weights.
    """
    weights, path = one.layout.model(one.cell, one.selection), one.path("safetensors")
    read_tensors(weights)
    with atomic(path) as temporary:
        shutil.copyfile(weights, temporary)
    return path


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


FORMATS: dict[str, Callable[[Exported], list[str]]] = {
    "compact": compact_file,
    "onnx": onnx_file,
    "robustbench": robustbench_entry,
}
