"""A long run: memory that stays flat, files that are closed, a line of metrics for every step; 5,000 steps with MINT_LONG."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from students import trainer_of, write_student

from mint.training import Trainer, runs


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(7200)
def test_a_long_run_grows_by_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpoints and evaluations on the way; memory is looked at once the first tenth has filled every buffer."""
    steps = 5000 if os.environ.get("MINT_LONG") else 60
    seen: list[tuple[int, int, int]] = []
    real = Trainer.after_step

    def noting(self: Trainer) -> None:
        real(self)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((self.step, pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(Trainer, "after_step", noting)
    model = write_student(tmp_path / "model")
    trainer_of(model, tmp_path / "run", 40, held_out=6, steps=steps, save_every=20, eval_every=30).run()
    kept = seen[steps // 5 :]
    assert max(files for _, _, files in kept) == min(files for _, _, files in kept)
    assert [row["step"] for row in runs.read_metrics(tmp_path / "run/metrics.jsonl")] == list(range(1, steps + 1))
    if os.environ.get("MINT_LONG"):
        slope = (kept[-1][1] - kept[0][1]) / (kept[-1][0] - kept[0][0]) * 1000
        print(f"{slope / kept[0][1]:.3%} of resident memory per 1,000 steps")
        assert slope < 0.01 * kept[0][1]
