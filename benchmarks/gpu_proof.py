"""Show on one GPU that the package runs there, computes the right values and the same bits, and how fast it is.

    python benchmarks/gpu_proof.py [--out FILE] [--parts 0 1 2] [--device cpu --reduced]

It needs torch, timm, numpy, pydantic and this checkout; no data, no network, neither Ray nor MLflow. Every part has a
limit of time, and every result is a line of JSON that is printed at once; an error in one part does not stop the
others. At the end there is a table, and the exit code is 0 if every criterion that decides is met. Without a GPU it
says so and ends with 0; with ``--device cpu --reduced`` the same code runs on one core in a minute, so that it works
the first time that a GPU is there.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LIMITS = {0: 30, 1: 120, 2: 60, 3: 60, 4: 60, 5: 80, 6: 40, 7: 30}
"""Seconds that each part may take, with the start of its process: 8 minutes in all."""

CPU_PATIENCE = 6
"""How many times as long a part may take on a CPU, whose load is not known."""

TITLES = {
    0: "what the device can do",
    1: "everything runs",
    2: "the values are right",
    3: "the same bits",
    4: "memory",
    5: "speed",
    6: "two processes",
    7: "utilisation",
}

Line = dict[str, Any]


def main() -> int:
    """Run the proof or, with a hidden option, what one of its processes does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--reduced", action="store_true", help="sizes that one CPU core can do in a minute")
    parser.add_argument("--parts", type=int, nargs="+", choices=sorted(LIMITS), default=sorted(LIMITS))
    parser.add_argument("--out", type=Path, help="a file that gets the lines, too")
    for hidden in ("--child", "--digests", "--load"):
        parser.add_argument(hidden, action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if given.child or given.digests or given.load:
        return compute(given)
    if given.device == "cuda" and (reason := why_no_gpu()) is not None:
        print(json.dumps({"skipped": reason}))
        return 0
    lines = []
    out = given.out.open("w") if given.out else None
    for line in proof(given.device, given.reduced, given.parts):
        text = json.dumps(line)
        print(text, flush=True)
        if out is not None:
            print(text, file=out, flush=True)
        lines.append(line)
    if out is not None:
        out.close()
    print(table(lines))
    return 0 if failures(lines) == [] else 1


def compute(given: argparse.Namespace) -> int:
    """Do what a process of the proof does; nothing heavy is imported before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS; it is read when CUDA starts
    from benchmarks.gpu.child import run_digests, run_load, run_parts
    from benchmarks.gpu.lab import Lab

    lab = Lab(given.device, given.reduced)
    if given.digests:
        run_digests(lab)
    elif given.load:
        run_load(lab)
    else:
        run_parts(lab, given.parts)
    return 0


def why_no_gpu() -> str | None:
    """Return why there is no GPU to prove anything on; None if there is one."""
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if answer.returncode:
        return f"torch cannot be imported: {(answer.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    cuda, is_available = answer.stdout.split()[-2:]
    if is_available == "True":
        return None
    if cuda == "None":
        return f"no GPU: this torch was built without CUDA ({sys.executable}); --device cpu --reduced runs without one"
    fix = "nvidia-smi says whether there is a driver, and R580 or newer is needed; --device cpu --reduced runs without"
    return f"no GPU: torch for CUDA {cuda} finds none: {fix}"


def proof(device: str, is_reduced: bool, parts: Sequence[int]) -> Iterator[Line]:
    """Run the parts in a process, and go on with the next part in a new one if a part fails or takes too long.

    Yields:
        The lines of the parts, and one for every part that did not end well.
    """
    left = list(parts)
    patience = 1 if device == "cuda" else CPU_PATIENCE
    options = ["--device", device, *["--reduced"] * is_reduced, "--child"]
    while left:
        command = [sys.executable, str(Path(__file__).resolve()), *options, "--parts", *map(str, left)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            yield from _followed(process, left, {part: patience * LIMITS[part] for part in left})


def _followed(process: subprocess.Popen[str], left: list[int], limits: Mapping[int, float]) -> Iterator[Line]:
    """Yield the lines of a process and remove the parts that it has dealt with from ``left``.

    Args:
        process: runs these parts.
        left: parts, in order.
        limits: seconds that each of them may take.
    """
    lines, errors = _reader(process.stdout), _reader(process.stderr)
    deadline, part = time.monotonic() + limits[left[0]], left[0]
    while True:
        try:
            text = lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            process.kill()
            yield {"part": part, "ended": True, "error": f"took longer than {limits[part]:g} s"}
            break
        if text is None:
            process.wait()
            if left and part in left:
                tail = [line for line in _drained(errors) if line.strip()][-1:]
                yield {"part": part, "ended": True, "error": f"exit code {process.returncode}: {''.join(tail).strip()}"}
                break
            return
        if not text.startswith("{"):
            continue
        line = json.loads(text)
        if "starts" in line:
            if line["part"] != part:
                part, deadline = line["part"], time.monotonic() + limits[line["part"]]
            continue
        yield line
        if "ended" in line:
            left.remove(part)
            if not left:
                return
            deadline = time.monotonic() + limits[left[0]]
    left.remove(part)


def _reader(stream: Any) -> queue.Queue[str | None]:
    """Return a queue that gets the lines of a stream, and None at its end."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for text in stream:
            lines.put(text)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _drained(lines: queue.Queue[str | None]) -> list[str]:
    """Return the lines of a queue up to its end."""
    return [text for text in iter(lambda: lines.get(timeout=5), None) if text is not None]


def failures(lines: Sequence[Line]) -> list[str]:
    """Return what did not end well and which criteria are not met."""
    return [
        f"{line['part']} {line.get('item', TITLES[line['part']])}"
        for line in lines
        if "error" in line or line.get("holds") is False
    ]


def table(lines: Sequence[Line]) -> str:
    """Return the results as a table of Markdown: one row per item that measured something, then what failed."""
    rows = ["", "| part | item | result | holds |", "|---|---|---|---|"]
    passed: dict[tuple[int, str], int] = {}
    for line in lines:
        part, item = line["part"], line.get("item")
        if item is None:
            if "error" in line:
                rows.append(f"| {part} | {TITLES[part]} | {line['error']} | **no** |")
            continue
        values = {k: v for k, v in line.items() if k not in ("part", "item", "holds", "seconds") and v is not None}
        if not values and line.get("holds"):
            kind = item.split()[0]
            passed[part, kind] = passed.get((part, kind), 0) + 1
            continue
        verdict = {True: "yes", False: "**no**", None: ""}[line.get("holds")]
        rows.append(f"| {part} | {item} | {', '.join(f'{k} {_text(v)}' for k, v in values.items())} | {verdict} |")
    rows += [f"| {part} | {kind} | {count} ran | yes |" for (part, kind), count in passed.items()]
    failed = failures(lines)
    judged = sum(line.get("holds") is not None for line in lines)
    rows += ["", f"{judged} criteria judged; " + (f"FAILED: {'; '.join(failed)}" if failed else "all are met")]
    return "\n".join(rows)


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1 else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
