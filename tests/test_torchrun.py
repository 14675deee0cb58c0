"""`torchrun -m vivit train` on real videos: a worker that is killed, a SIGTERM, and the same run with one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parity import F32_BUDGET, assert_same
from processes import free_port
from test_train import ROOT, TINY, losses

pytest.importorskip("av")
pytestmark = pytest.mark.full

CALM = ["epochs=30", "evaluate_every=30", "model.dropout=0.0", "model.drop_path=0.0", "optimizer.name=sgd"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    from test_data import write

    root = tmp_path_factory.mktemp("videos")
    for i in range(6):
        write(root / "brightens" / f"{i}.mp4", frames=8 + i, brightness=12)
        write(root / "still" / f"{i}.mp4", frames=8 + i, brightness=0)
    return root


def command(out: Path, videos: Path, *more: str, processes: int = 0) -> list[str]:
    config = out.parent / "tiny.toml"
    config.write_text(TINY)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(free_port())]
    settings = [f"--set={setting}" for setting in (*CALM, "data.short_side=18")]
    train = ["-m", "vivit", "train", str(config), "--data", str(videos), "--out", str(out), "--resume"]
    return [sys.executable, *(torchrun if processes else []), *train, *settings, *more]


def started(argv: list[str], tmp_path: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(argv, env=env, stderr=open(tmp_path / "stderr", "w"), stdout=subprocess.PIPE, text=True)


def when_logged(process: subprocess.Popen, out: Path, lines: int) -> None:
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        log = out / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= lines:
            return
        time.sleep(0.01)
    raise AssertionError(f"ended or too slow before {lines} steps: exit status {process.poll()}")


def workers(process: subprocess.Popen) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert found, "torchrun has no workers"
    return sorted(map(int, found))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are found below /proc")
def test_a_killed_worker_ends_the_job_and_the_run_goes_on(videos, tmp_path):
    whole = started(command(tmp_path / "whole", videos), tmp_path)
    whole.communicate(timeout=300)
    assert whole.returncode == 0, (tmp_path / "stderr").read_text()

    out = tmp_path / "out"
    killed = started(command(out, videos, "--parallel", "fsdp", processes=2), tmp_path)
    when_logged(killed, out, 5)
    os.kill(workers(killed)[-1], signal.SIGKILL)
    killed.communicate(timeout=120)
    said = (tmp_path / "stderr").read_text()
    assert killed.returncode != 0 and "SIGKILL" in said, said
    assert "another of the 2 processes ended or does not answer" in said and "--resume goes on from" in said, said

    after = json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"]
    stopped = started(command(out, videos, "--parallel", "ddp", processes=2), tmp_path)
    when_logged(stopped, out, after + 4)
    stopped.send_signal(signal.SIGTERM)
    told = stopped.communicate(timeout=120)[0]
    said = (tmp_path / "stderr").read_text()
    assert "stopped by SIGTERM after step" in said and said.count("stopped by SIGTERM") == 1, said
    assert "2 processes (ddp)" in told and "steps from 0," not in told, told
    step = len(losses(out))
    assert [p.name for p in out.glob("*checkpoint*")] == [f"checkpoint-{step:06d}"]

    ended = started(command(out, videos), tmp_path)
    told = ended.communicate(timeout=300)[0]
    assert ended.returncode == 0 and f"steps from {step}," in told, (tmp_path / "stderr").read_text()
    curves = [torch.tensor(losses(folder), dtype=torch.float64) for folder in (tmp_path / "whole", out)]
    assert_same(curves[1], curves[0], 100 * F32_BUDGET)  # 60 steps, each on the rounding of those before
    assert (out / "model.safetensors").exists()
