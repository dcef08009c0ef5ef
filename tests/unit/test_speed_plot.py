"""The plot of speed against sparsity."""

import pytest


@pytest.fixture(scope="module")
def speed_plot(load_benchmark):
    return load_benchmark("speed_plot")


ROWS = [
    {"case": f"sparse {kind} {arch} {sparsity} fp32", "ratio": ratio}
    for kind, ratio in (("gradient", 6.0), ("step", 4.0))
    for arch in ("resnet18", "small_resnet")
    for sparsity in ("0.99", "0.9")
]


def test_rows_of_a_kind_become_lines_of_density_and_ratio(speed_plot):
    found = speed_plot.series(ROWS, "step")
    assert found == {
        "resnet18 fp32": [(1.0, 4.0), (10.0, 4.0)],
        "small_resnet fp32": [(1.0, 4.0), (10.0, 4.0)],
    }


def test_a_picture_is_drawn_in_a_new_folder(speed_plot, tmp_path):
    picture = tmp_path / "new" / "speed.png"
    speed_plot.draw(ROWS, "cpu (1 thread)", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
