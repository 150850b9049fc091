"""A label set of a million lines: read, made a trie, ranked best first and in full, by a tiny model. One JSON line a step.

    python tests/bench/million.py [--labels 1000000] [--full]

Seconds are those that the process computed. `resident_bytes` is what is held after the step, `peak_bytes` the most that was
held in it; both are of the whole process, which has some 250 MB of libraries. `--full` takes minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]

from checkpoints import write_llama  # noqa: E402

from mint.decoders import load_decoder  # noqa: E402
from mint.labels import read_labels  # noqa: E402
from mint.scoring import Ranker  # noqa: E402

WORDS = [
    *("muscular", "spinal", "ocular", "renal", "cardiac", "familial", "juvenile", "early", "late", "severe"),
    *("mild", "dysplasia", "ataxia", "anemia", "with", "and"),
]
CASE = [{"role": "user", "content": "Short stature, ptosis."}]
TINY = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1, "num_key_value_heads": 1, "std": 0.5}


def write_labels(path: Path, count: int) -> Path:
    """So many names of four words and a number, in no order."""
    drawn, names = random.Random(0), dict[str, None]()
    while len(names) < count:
        names[f"{' '.join(drawn.choices(WORDS, k=4))} {drawn.randrange(10000)}"] = None
    path.write_text("".join(f"{name}\n" for name in names))
    return path


def held(name: str) -> int:
    """Bytes of this process, by their name in the kernel's own account."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def step(name: str, work: Callable[[], Any], **facts: Any) -> Any:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
    start = time.process_time()
    found = work()
    seconds = round(time.process_time() - start, 1)
    line = {"step": name, "seconds": seconds, "resident_bytes": held("VmRSS"), "peak_bytes": held("VmHWM"), **facts}
    print(json.dumps(line), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--full", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        file = write_labels(Path(place) / "labels.txt", words.labels)
        decoder = load_decoder(write_llama(Path(place) / "model", **TINY), device="cpu", dtype="float32")
        known = step("read", lambda: read_labels(file), labels=words.labels)
        ranker = step("trie", lambda: Ranker(decoder, known.labels))
        best = step("best first", lambda: ranker.rank("a", CASE, 10), nodes=len(ranker.layout.trie))
        if words.full:
            prompt = ranker.prompt(CASE)
            full = step("full", lambda: ranker.logp([prompt])[0])
            first = full.sort(descending=True, stable=True).indices[:10].tolist()
            print(json.dumps({"same": [known.labels[c] for c in first] == list(best.top(10))}))


if __name__ == "__main__":
    main()
