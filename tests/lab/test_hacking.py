"""The laboratory's arithmetic: best-of-n by enumeration, fits that recover what made the curve."""

import json
import math

import numpy as np
import pytest

from lab.hacking import at_kl, curve, fit, report
from nanoalign import UserError


@pytest.mark.parametrize("logarithmic", [False, True])
def test_a_fit_recovers_the_form_that_made_the_curve(logarithmic):
    points = []
    for d in np.linspace(0, 3, 12):
        slope = math.log(d) if logarithmic and d else d
        points.append({"kl": d * d, "judge": 0.3 + d * (1.7 - 0.4 * slope)})
    assert fit(points, "judge", logarithmic) == pytest.approx((1.7, 0.4))


def test_a_value_at_a_kl_is_interpolated_at_the_first_crossing():
    points = [{"kl": kl, "judge": judge} for kl, judge in ((0, 0.0), (2, 1.0), (4, 0.0), (3, -5.0))]
    assert at_kl(points, 1, "judge") == pytest.approx(0.5)
    assert at_kl(points, 3, "judge") == pytest.approx(0.5)
    assert math.isnan(at_kl(points, 9, "judge"))


def test_the_report_reads_runs_of_several_seeds_and_writes_their_curves(tmp_path, capsys):
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        rows = [{"event": "start"}, {"step": 3, "loss": 1.0}]
        rows += [{"step": k, "eval_kl": k, "eval_reward": 2.0 * k, "eval_judge": seed - k} for k in range(3)]
        (folder / "beta-0.metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert len(curve(folder / "beta-0.metrics.jsonl")) == 3
    report([str(tmp_path / "0"), str(tmp_path / "1")])
    out = capsys.readouterr().out
    assert "| beta-0 | 2.00 ± 0.00 | 4.00 ± 0.00 | -1.50 ± 0.50 | 0.00 ± 0.50 | -0.50 ± 0.50 |" in out
    lines = (tmp_path / "0" / "curves.csv").read_text().splitlines()
    assert lines[0] == "run,seed,evaluation,kl,proxy,judge" and len(lines) == 7
    with pytest.raises(UserError, match="no run"):
        report([str(tmp_path)])
