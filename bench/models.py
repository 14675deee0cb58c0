"""ViViT-B/16x2 against transformers' ViViT, random weights: time of a forward or a training step, and peak memory.

    python -m bench.models [--dtype float32 bfloat16] [--step forward|train] [--rounds 5] [--frames 32] [--tuned-malloc]

Each model runs in a process of its own, so that its peak memory is its own; the processes take turns, one call each, so
that a busy machine slows all of them alike. What is reported is the ratio of medians, with the spread of the ratio over
rounds. The peer is what its users run: attn_implementation="sdpa". `--tuned-malloc` keeps freed memory in the process
(glibc's MALLOC_ variables), which takes page faults on fresh temporaries out of the comparison: report both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time

MODELS = ("transformers", "joint", "factorized_encoder", "factorized_self_attention", "factorized_dot_product")
TUNED = {
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_TOP_PAD_": "1000000000",
}


def build(name: str, frames: int):
    """(model, function from [B, F, C, Y, X] video to logits)"""
    import torch

    torch.manual_seed(0)
    if name == "transformers":
        from transformers import VivitConfig, VivitForVideoClassification

        config = VivitConfig(num_frames=frames)
        config.num_labels = 400
        model = VivitForVideoClassification._from_config(config, attn_implementation="sdpa")
        return model, lambda video: model(video).logits
    from vivit import ViViT, ViViTConfig

    model = ViViT(ViViTConfig.preset("B/16x2", attention=name, frames=frames))
    return model, lambda video: model(video, layout="BFCYX")


def work(name: str, dtype: str, step: str, frames: int) -> None:
    """A worker: one timed call per line on standard input, peak memory at its end."""
    import torch

    model, call = build(name, frames)
    model.to(getattr(torch, dtype)).train(step == "train")
    video = torch.randn(1, frames, 3, 224, 224).to(getattr(torch, dtype))

    def once() -> None:
        with torch.set_grad_enabled(step == "train"):
            logits = call(video)
            if step == "train":
                logits.float().square().mean().backward()
                model.zero_grad(set_to_none=True)

    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        once()
        print(time.perf_counter() - began, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"peak_mib": peak / 1024, "loaded_mib": loaded / 1024}), flush=True)


class Worker:
    """One model in a process of its own."""

    def __init__(self, name: str, options: list[str], environment: dict[str, str]):
        command = [sys.executable, "-m", "bench.models", *options, "--worker", name]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.answers = self.process.stdin, self.process.stdout
        if self.answers.readline().strip() != "ready":
            raise SystemExit(f"bench.models: {name} did not start; its message is above")

    def seconds(self) -> float:
        self.requests.write("go\n")
        self.requests.flush()
        answer = self.answers.readline()
        if not answer:
            raise SystemExit("bench.models: a model stopped in its call; its message is above")
        return float(answer)

    def finish(self) -> dict[str, float]:
        self.requests.close()
        memory = json.loads(self.answers.readline())
        self.process.wait()
        return memory


def compare(names: list[str], dtype: str, step: str, rounds: int, frames: int, tuned: bool) -> dict[str, dict]:
    """Times of every model, taken in turns, and its peak memory."""
    environment = os.environ | (TUNED if tuned else {})
    options = ["--dtype", dtype, "--step", step, "--frames", str(frames)]
    workers = {name: Worker(name, options, environment) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, worker in workers.items():
            elapsed = worker.seconds()
            if turn:  # the first call of each warms up
                times[name].append(elapsed)
    return {name: {"times": times[name], **worker.finish()} for name, worker in workers.items()}


def report(results: dict[str, dict], title: str) -> None:
    first = next(iter(results))
    base = results[first]["times"]
    print(f"\n{title}\n{'model':<28}{'median ms':>10}{'ratio':>8}{'spread':>14}{'peak MiB':>10}")
    for name, result in results.items():
        ratios = sorted(a / b for a, b in zip(base, result["times"], strict=True))
        median = statistics.median(result["times"])
        ratio = statistics.median(base) / median
        print(
            f"{name:<28}{median * 1e3:>10.0f}{ratio:>8.2f}{ratios[0]:>7.2f}-{ratios[-1]:.2f}{result['peak_mib']:>12.0f}"
        )
    print(f"ratio: times faster than {first}; spread: over rounds; peak: of the whole process")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float64"]
    )
    parser.add_argument("--step", default="forward", choices=["forward", "train"])
    parser.add_argument("--models", nargs="+", default=["transformers", "joint", "factorized_encoder"], choices=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--tuned-malloc", action="store_true")
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.dtype[0], args.step, args.frames)
    import torch

    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    machine = f"{platform.machine()} {capability}, {threads} threads, torch {torch.__version__}"
    for dtype in args.dtype:
        results = compare(args.models, dtype, args.step, args.rounds, args.frames, args.tuned_malloc)
        malloc = "tuned malloc" if args.tuned_malloc else "default malloc"
        report(results, f"ViViT-B/16x2, {args.frames} frames, 1 clip, {args.step}, {dtype}, {malloc}; {machine}")


if __name__ == "__main__":
    main()
