"""Locks, stop signals and resume states."""

import io
import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from robsparse.base.errors import UsageError
from robsparse.base.files import locked
from robsparse.training.checkpoints import Checkpoint, Interrupted, StopRequest

# ---------------------------------------------------------------- the lock


def test_second_holder_is_refused_in_one_line(tmp_path):
    with locked(tmp_path / "run" / "job"):
        with (
            pytest.raises(UsageError, match="another process is running the same job"),
            locked(tmp_path / "run" / "job"),
        ):
            pass
        with locked(tmp_path / "other"):
            pass


@pytest.mark.parametrize("fails", [False, True])
def test_lock_is_released_after_the_block(fails, tmp_path):
    try:
        with locked(tmp_path / "job"):
            if fails:
                raise KeyError
    except KeyError:
        pass
    with locked(tmp_path / "job"):
        pass


def test_second_process_is_refused_and_a_killed_process_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from robsparse.base.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "job")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="another process"), locked(tmp_path / "job"):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with locked(tmp_path / "job"):
        pass


def test_folder_that_cannot_be_created_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write results here"),
        locked(tmp_path / "file" / "job"),
    ):
        pass


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_is_recorded_and_the_old_handlers_are_restored(signum):
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with StopRequest().listen() as stop:
        assert stop.signum is None
        os.kill(os.getpid(), signum)
        assert stop.signum == signum
    assert {s: signal.getsignal(s) for s in before} == before


@pytest.mark.parametrize("max_steps", [1, 3])
def test_stop_is_requested_after_so_many_steps(max_steps):
    stop = StopRequest(max_steps)
    for _ in range(max_steps - 1):
        assert stop.after_step() is None
    assert stop.after_step() == signal.SIGTERM


def test_without_max_steps_only_a_signal_requests_a_stop():
    with StopRequest().listen() as stop:
        assert [stop.after_step() for _ in range(5)] == [None] * 5
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.after_step() == signal.SIGUSR1


def test_interrupted_names_the_signal_and_the_state_file(tmp_path):
    error = Interrupted(signal.SIGTERM, tmp_path / "state.pt")
    assert "SIGTERM" in str(error)
    assert str(tmp_path / "state.pt") in str(error)


# ---------------------------------------------------------------- resume states


def state(number):
    return {"step": number, "model": {"w": torch.full((2,), float(number))}, "list": [1, {"a": 2}]}


def step_of(loaded):
    return None if loaded is None else loaded["step"]


@pytest.fixture
def checkpoint(tmp_path):
    return Checkpoint(tmp_path, "settings")


@pytest.fixture
def two(checkpoint):
    """A checkpoint with state 1 and the newer state 2."""
    checkpoint.save(state(1))
    checkpoint.save(state(2))
    return checkpoint


def test_nothing_saved_is_none(checkpoint):
    assert checkpoint.load() is None


def test_saved_state_is_loaded(checkpoint):
    checkpoint.save(state(5))
    loaded = checkpoint.load()
    assert loaded["list"] == [1, {"a": 2}]
    assert loaded["model"]["w"].tolist() == [5.0, 5.0]


def test_newest_state_is_loaded_and_the_previous_one_is_stored(two):
    assert step_of(two.load()) == 2
    two.save(state(3))
    assert step_of(two.load()) == 3
    assert {path.name for path in two.path.parent.iterdir()} == {"state.pt", "state.previous.pt"}


def test_state_of_other_settings_is_ignored(two):
    assert Checkpoint(two.path.parent, "others").load() is None


def test_previous_state_is_used_if_the_newest_has_other_settings(checkpoint):
    checkpoint.save(state(1))
    other = Checkpoint(checkpoint.path.parent, "others")
    other.save(state(9))
    assert step_of(checkpoint.load()) == 1
    assert step_of(other.load()) == 9


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write(data):
    return lambda path: path.write_bytes(data)


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "empty": write(b""),
    "text": write(b"hello world, this is no checkpoint"),
    "word": write(b"not a checkpoint"),
    "zeros": write(bytes(5000)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bytes turned over": lambda path: path.write_bytes(
        path.read_bytes()[:300] + bytes(200) + path.read_bytes()[500:]
    ),
    "other pickle": lambda path: path.write_bytes(pickle.dumps({"digest": "settings"}, 2)),
    "list": lambda path: torch.save([1, 2], path),
    "no digest": lambda path: torch.save({"step": 7}, path),
    "code": lambda path: torch.save({"digest": "settings", "x": Marker(path.with_name("x"))}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_previous_state_is_used_if_the_newest_is_damaged(damage, two):
    DAMAGES[damage](two.path)
    assert step_of(two.load()) == 1
    assert not two.path.with_name("x").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_two_damaged_states_start_from_the_beginning(damage, two):
    for path in (two.path, two.path.with_name("state.previous.pt")):
        DAMAGES[damage](path)
    assert two.load() is None
    assert not two.path.with_name("x").exists()


def test_crash_while_saving_keeps_the_last_state(two, monkeypatch):
    def write_half(content, handle):
        handle.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        two.save(state(3))
    assert step_of(two.load()) == 2
    assert {path.name for path in two.path.parent.iterdir()} == {"state.pt", "state.previous.pt"}


@pytest.mark.parametrize("where", ["sum", "first", "middle", "last"])
def test_a_state_with_one_flipped_byte_is_never_used(where, two, capsys):
    for path, expected in ((two.path, 1), (two.previous, None)):
        content = bytearray(path.read_bytes())
        content[{"sum": 3, "first": 32, "middle": len(content) // 2, "last": -1}[where]] ^= 1
        path.write_bytes(content)
        assert step_of(two.load()) == expected
    message = capsys.readouterr().out.splitlines()
    assert message[-2:] == [
        f"{two.path}: damaged; trying the previous state",
        f"{two.previous}: damaged; training starts from the beginning",
    ]


def test_flipped_weight_is_found_although_torch_reads_the_file(two):
    loaded = two.load()
    loaded["model"]["w"][0] += 1
    content = io.BytesIO()
    torch.save(loaded, content)
    two.path.write_bytes(two.path.read_bytes()[:32] + content.getvalue())
    assert step_of(two.load()) == 1


def test_a_line_reports_that_a_state_of_another_run_is_not_used(two, capsys):
    assert Checkpoint(two.path.parent, "others").load() is None
    message = capsys.readouterr().out.splitlines()
    assert len(message) == 2
    assert "saved with other settings, code, libraries or device" in message[0]


def test_clear_removes_the_states_and_nothing_else(two):
    other = two.path.with_name("lock")
    other.write_text("")
    two.path.with_name(".state.pt.x8k2").write_text("left by a killed save")
    two.clear()
    assert list(two.path.parent.iterdir()) == [other]
    assert two.load() is None
