"""Prepare against `datasets.map`: MB of JSONL a second, from the file to rows of token ids.

The peer gets every advantage: only `input_ids`, no labels, no EOS, and its time starts after the
JSON was read into Arrow. Ours is the whole of `prepare`: starting processes, validating each line,
digests, tokenising with EOS, held-out split, tables. Same tokenizer, 2 processes each, run in turn.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import results

ROOT = Path(__file__).resolve().parent.parent
LENGTH = 1024
# What the figures are of.
FILES = [
    "bench/prepare.py",
    *results.trainer("prepare corpus documents tokens encoder tables rows"),
]


def ours(model: Path, data: Path, scratch: Path) -> dict[str, float]:
    """Prepare into an empty directory, and once more with everything found again."""
    import jobs

    from cptjob_trainer.config import Paths
    from cptjob_trainer.data.prepare import prepare

    config = jobs.make(model, data, Paths(output=scratch), LENGTH, batch=8)
    figures = {}
    for name in ("seconds", "again"):
        start, before = time.perf_counter(), processor_seconds()
        prepared = prepare(config, processes=2, packs=lambda _: True)
        figures[name] = time.perf_counter() - start
        figures[f"{name} cpu"] = processor_seconds() - before
        parts = [*prepared.sources, *prepared.heldout]
        # Without the EOS of each document, which the peer does not add.
        figures["tokens"] = sum(part.tokens - part.documents for part in parts)
    return figures


def peer(model: Path, data: Path, scratch: Path) -> dict[str, float]:
    """Tokenise and group with datasets, as the example scripts of transformers do."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    # As ours: text that spells a control token is text.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(model / "tokenizer.json"), split_special_tokens=True
    )
    loaded = datasets.load_dataset(
        "json", data_files=str(data), split="train", cache_dir=str(scratch)
    )

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], return_attention_mask=False, return_token_type_ids=False)
        return {"input_ids": encoded["input_ids"]}

    def group(batch: dict[str, Any]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[at : at + LENGTH] for at in range(0, len(ids), LENGTH)]}

    start, before = time.perf_counter(), processor_seconds()
    rows = loaded.map(tokenize, batched=True, num_proc=2, remove_columns=["text"])
    rows = rows.map(group, batched=True, num_proc=2)
    seconds, cpu = time.perf_counter() - start, processor_seconds() - before
    column = rows.with_format("arrow")[:]["input_ids"]
    tokens = sum(len(part.flatten()) for part in column.chunks)
    return {"seconds": seconds, "seconds cpu": cpu, "tokens": tokens}


def processor_seconds() -> float:
    """Of this process and of the ended ones that it started: what a busy machine does not change."""
    of = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in of)


def measure(arm: str, model: Path, data: Path) -> dict[str, float]:
    """Run one arm in a fresh process."""
    command = [sys.executable, __file__, "--arm", arm, "--model", str(model), "--data", str(data)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise SystemExit(f"the arm {arm} failed:\n{ended.stderr}")
    figures: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "volumes/models/smollm2-135m")
    parser.add_argument(
        "--data", type=Path, help="a JSONL file; made from installed text if absent"
    )
    parser.add_argument("--megabytes", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=["ours", "peer"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-prepare-") as directory:
        if options.arm:
            arm = {"ours": ours, "peer": peer}[options.arm]
            print(json.dumps(arm(options.model, options.data, Path(directory))))
            return
        compare(options, Path(directory))


def compare(options: argparse.Namespace, scratch: Path) -> None:
    """Both arms in turn, and the table."""
    import texts

    data = options.data or scratch / "data.jsonl"
    distinct = data.stat().st_size if options.data else texts.write(data, options.megabytes * 10**6)
    size = data.stat().st_size / 1e6
    rounds = []
    for _ in range(options.rounds):
        rounds.append({arm: measure(arm, options.model, data) for arm in ("peer", "ours")})
        pair = rounds[-1]
        if pair["peer"]["tokens"] != pair["ours"]["tokens"]:
            raise SystemExit(f"the arms disagree: {pair}")
        print(
            f"peer {size / pair['peer']['seconds']:.1f} MB/s, "
            f"ours {size / pair['ours']['seconds']:.1f} MB/s",
            flush=True,
        )

    def each(arm: str, name: str) -> float:
        return median(pair[arm][name] for pair in rounds)

    ratio = median(pair["peer"]["seconds"] / pair["ours"]["seconds"] for pair in rounds)
    rows = [
        [
            label,
            f"{size / each(arm, name):.1f}",
            f"{median(pair['peer']['seconds'] / pair[arm][name] for pair in rounds):.1f}",
            f"{each(arm, name + ' cpu'):.1f}",
        ]
        for label, arm, name in (
            ("`datasets.map`, batched, num_proc=2, grouped", "peer", "seconds"),
            ("`cptjob prepare`, 2 processes", "ours", "seconds"),
            ("the same again, found in the cache", "ours", "again"),
        )
    ]
    verdict = "reached" if ratio >= 2 else "NOT reached"
    results.write(
        "prepare",
        f"{size:.0f} MB of JSONL ({distinct / 1e6:.0f} MB of distinct text), tokenizer of "
        f"{options.model.name}, rows of {LENGTH}, {options.rounds} rounds in turn, medians.\n\n"
        + results.table(["", "MB/s", "times the peer", "CPU seconds"], rows)
        + f"\n\nTarget: at least 2 times: {verdict}.",
        FILES,
    )
    print(f"{ratio:.2f} times the peer")


if __name__ == "__main__":
    main()
