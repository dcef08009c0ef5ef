"""Precision: what is picked, what it computes in, and what a training run says of it."""

import json
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from robsparse.compute import machine
from robsparse.fast import folding
from robsparse.schema.threat import Crafting
from robsparse.study.cells import Layout
from robsparse.training import objectives
from robsparse.training.loop import train_cell

CPU = torch.device("cpu")


MEMORY = """
import ctypes, sys
import torch
from robsparse.compute.machine import prepare

class Mallinfo(ctypes.Structure):  # malloc.h of glibc
    _fields_ = [(f"number{place}", ctypes.c_int) for place in range(10)]

mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Mallinfo
if sys.argv[1:]:
    prepare(1)
before, tensor = mallinfo().number3, torch.empty(20_000_000)
print(mallinfo().number3 - before)  # blocks that go back to the system when they are freed
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has mallopt")
@pytest.mark.parametrize(("arguments", "expected"), [([], "1"), (["prepared"], "0")])
def test_prepared_process_keeps_freed_memory(arguments, expected):
    command = [sys.executable, "-c", MEMORY, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: object())
    machine.prepare(torch.get_num_threads())


@pytest.fixture
def amx(monkeypatch):
    """Switch the matrix units on and off, whatever this machine has."""
    return lambda there: monkeypatch.setattr(machine, "_has_amx", lambda: there)


@pytest.mark.parametrize(("there", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_there_are_matrix_units(amx, there, expected):
    amx(there)
    assert machine.pick_precision("auto", CPU) == expected
    assert machine.pick_precision("fp32", CPU) == "fp32"
    assert machine.pick_precision("bf16", CPU) == "bf16"


def test_a_wish_that_cannot_be_had_is_one_line_and_no_error(capsys):
    assert machine.pick_precision("tf32", CPU) == "fp32"
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "no tf32, fp32 instead" in out


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_convolutions_compute_in_the_precision(precision, dtype):
    layer, x = nn.Conv2d(1, 2, 3), torch.rand(1, 1, 5, 5)
    with machine.computing(precision, CPU):
        assert layer(x).dtype == dtype
    assert layer(x).dtype == torch.float32


def test_tf32_is_off_but_inside_its_block():
    machine.prepare(torch.get_num_threads())
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    assert not any(switch.allow_tf32 for switch in switches)
    with machine.computing("tf32", CPU):
        assert all(switch.allow_tf32 for switch in switches)
        with machine.computing("fp32", CPU):
            assert not any(switch.allow_tf32 for switch in switches)
    assert not any(switch.allow_tf32 for switch in switches)


@pytest.mark.parametrize(
    ("crafting", "training", "message"),
    [
        ("fp32", "fp32", ""),
        ("bf16", "bf16", ", bf16"),
        ("bf16", "fp32", ", bf16 while crafting"),
        ("fp32", "tf32", ", tf32 in the training pass"),
        ("bf16", "tf32", ", bf16 while crafting, tf32 in the training pass"),
    ],
)
def test_a_device_is_named_with_its_precision(crafting, training, message):
    assert machine.precision_note(crafting, training) == message


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 36, 4)).eval()


def crafted(model, precision, bn_mode="eval"):
    torch.manual_seed(1)
    x, y = torch.rand(64, 3, 6, 6), torch.arange(64) % 4
    crafting = Crafting(steps=3, step_size=0.01, bn_mode=bn_mode)
    generator = torch.Generator().manual_seed(0)
    attacker = objectives.Attacker(0.03, crafting, generator, precision=precision)
    return x, attacker.attack_labels(model, x, y), y


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
def test_crafting_in_bf16_moves_nearly_all_pixels_the_same_way(bn_mode):
    x, exact, y = crafted(network(), "fp32", bn_mode)
    _, rough, _ = crafted(network(), "bf16", bn_mode)
    assert rough.dtype == torch.float32
    assert (rough - x).abs().max() <= 0.03 + 1e-6
    # In eval mode, a form may compute in fp32, because it is cheaper. Then all pixels are the same.
    assert ((exact - x).sign() == (rough - x).sign()).float().mean() > 0.9
    with torch.no_grad():
        losses = [F.cross_entropy(network()(images), y) for images in (x, exact, rough)]
    assert losses[2] - losses[0] > 0.95 * (losses[1] - losses[0])


def test_bf16_view_keeps_the_digits_of_its_logits_and_leaves_double_precision_alone():
    model, x = network(), torch.rand(4, 3, 6, 6)
    rough = folding.folded_view(model, x, torch.bfloat16)(x)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, rough.bfloat16().float())
    exact = model(x)
    assert 0 < ((rough - exact).norm() / exact.norm()).item() < 0.02
    model.double()
    x = x.double()
    view = folding.folded_view(model, x, torch.bfloat16)
    assert ((view(x) - model(x)).norm() / model(x).norm()).item() < 1e-12


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_records_what_it_computed_in(precision, study_data, load_study, tmp_path):
    study_data["grid"] |= {"methods": ["bcs"]}
    study_data["training"]["precision"] = precision
    study_data["training"]["crafting"]["precision"] = "bf16"
    study = load_study(study_data)
    [cell], layout = study.cells(), Layout(tmp_path)
    train_cell(study, cell, layout, device="cpu")
    device = json.loads(layout.training(cell).read_text())["cost"]["device"]
    assert device.endswith(", bf16" if precision == "bf16" else ", bf16 while crafting")
