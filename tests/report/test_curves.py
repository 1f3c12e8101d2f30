import xml.etree.ElementTree as ET

from qsam2.report.curves import draw_loss, read_curve


def write(folder, version, text):
    place = folder / f"version_{version}"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(text)


def test_a_resumed_run_reads_as_one_curve_and_the_later_values_win(tmp_path):
    write(tmp_path, 0, "step,loss,lr\n10,5.0,\n10,,0.1\n20,4.0,\n30,9.0,\n")
    write(tmp_path, 10, "lr,step,loss\n,30,3.0\n,40,2.0\n")
    write(tmp_path, 9, "step,loss\n30,8.0\n")
    assert read_curve(tmp_path, "loss") == [(10, 5.0), (20, 4.0), (30, 3.0), (40, 2.0)]
    assert read_curve(tmp_path, "lr") == [(10, 0.1)]
    assert read_curve(tmp_path / "absent", "loss") == []


def test_the_loss_is_drawn_with_a_description():
    svg = draw_loss([(step, 10 - step / 10) for step in range(1, 60)])
    root = ET.fromstring(svg)
    assert root.tag.endswith("svg") and root.get("role") == "img"
    assert root.get("aria-label") == "Loss over 59 logged steps, from 8.95 to 5.05"
    assert draw_loss([(1, 2.0)]) is None
