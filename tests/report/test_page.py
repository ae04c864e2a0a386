"""The page: what it tells, and that it needs and lets in nothing from outside."""

import json
import os
import re
import subprocess
import sys
from typing import Any

from cptjob_trainer.results.report import write_report

HOSTILE = '</title><script>alert("1")</script><img src=http://example.org/x.png> $\\frac{ & \'"'

PLOTS = [
    "Loss",
    "Held-out loss against the base model",
    "Learning rate",
    "Gradient norm",
    "Tokens per second",
    "Waiting and padding",
    "Tokens by source",
]


def test_a_complete_run_is_told_with_its_losses_before_and_after(run: Any, page: Any) -> None:
    text = page(write_report(run.write(), run.manifest())).text
    for words in (
        "Complete",
        "Continued pre-training of pvc://models/small, on 2 processes, "
        "complete at 2026-01-02 03:04:05 UTC.",
        "200 of 200",
        "614,400",
        "52 s\nand 2.5 s of evaluation",
        "4.000 → 3.500\n−0.5000 (better); perplexity 54.6 → 33.12",
        "3.000 → 3.250\n+0.2500 (worse: forgotten); perplexity 20.09 → 25.79",
        "schedule.type\nCosine",
        "torch\n2.15.0",
    ):
        assert words in text


def test_every_plot_is_there_with_a_title_and_a_story_for_those_who_do_not_see_it(
    run: Any, page: Any
) -> None:
    found = page(write_report(run.write(), run.manifest()))
    assert found.titles == PLOTS
    drawings = dict(zip(PLOTS, found.drawings, strict=True))
    assert "at step 200; lowest" in drawings["Loss"]
    assert "Domain text: -0.5000 at step 200" in drawings["Held-out loss against the base model"]
    ids = found.attributes("id")
    named = [name for names in found.attributes("aria-labelledby") for name in names.split()]
    assert len(named) == 2 * len(PLOTS)
    assert set(named) <= set(ids)


def test_the_table_of_sources_compares_the_mix_with_what_was_asked_for(run: Any, page: Any) -> None:
    text = page(write_report(run.write(), run.manifest())).text
    # 2048 of 3072 tokens a step; 5 % of general text where no weight is given.
    assert "python\nDomain\n10\n4,096\n409,600\n100.00\n66.67 %\n95.00 %" in text


def test_the_numbers_are_there_as_a_table_too(run: Any, page: Any) -> None:
    run.total = run.done = 5
    run.evaluate_every = 5
    text = page(write_report(run.write(), run.manifest())).text
    assert "Training, step by step" in text
    assert re.search(
        r"^5\n2\.9\d{3}\n1e-5\n1\.0\d+\n9005\n3\.85 %\n0\.50 %\n0$", text, re.MULTILINE
    )
    assert "0\n4.0000\n–\n3.0000\n–\n4.0000\n3.0000" in text
    assert "5\n3.5000\n−0.5000\n3.2500\n+0.2500\n3.5000\n3.2500" in text


def test_names_from_outside_are_text_and_nothing_else(run: Any, page: Any) -> None:
    run.name = run.model = HOSTILE
    run.sources = {HOSTILE: "Domain", "a\ud800b\x00": "General"}
    manifest = {**run.manifest(), "settings": {HOSTILE: HOSTILE}, "software": {HOSTILE: HOSTILE}}
    found = page(write_report(run.write(), manifest))
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "img"}
    assert found.text.count(HOSTILE) >= 7
    assert not any("alert" in drawing for drawing in found.drawings)


def test_the_page_refers_to_nothing_but_itself(run: Any, page: Any) -> None:
    found = page(write_report(run.write(), run.manifest()))
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    assert found.attributes("src") == []
    references = [value for name in ("href", "xlink:href") for value in found.attributes(name)]
    references += re.findall(r"url\(([^)]*)\)", found.html)
    ids = found.attributes("id")
    assert references
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in found.html
    assert "://" not in found.html.replace("pvc://models/small", "")


def test_no_two_elements_share_an_id(run: Any, page: Any) -> None:
    run.skipped = frozenset([7])
    ids = page(write_report(run.write(), run.manifest())).attributes("id")
    assert len(ids) == len(set(ids))


def test_drawings_take_their_colours_from_the_page(run: Any, page: Any) -> None:
    found = page(write_report(run.write(), run.manifest()))
    styles = " ".join(found.attributes("style"))
    # White is matplotlib's way of writing "no fill" in clip paths; nothing else may be fixed.
    assert set(re.findall(r"#[0-9a-f]{6}", styles)) <= {"#ffffff"}
    used = set(re.findall(r"var\((--[a-z0-9]+)\)", found.html))
    assert used - {"--mark"} <= set(re.findall(r"(--[a-z0-9]+):", found.html))


def test_the_same_run_gives_the_same_bytes_in_another_process_and_from_the_command(
    run: Any,
) -> None:
    out = run.write()
    first = write_report(out, run.manifest()).read_bytes()
    (out / "report.html").unlink()
    (out / "manifest.json").write_text(json.dumps({**run.manifest(), "files": {}}, sort_keys=True))
    (out / "matplotlibrc").write_text("lines.linewidth: 9\n")
    command = [sys.executable, "-m", "cptjob_trainer.results.report", str(out)]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{out / 'report.html'}\n")
    assert (out / "report.html").read_bytes() == first


def test_without_general_data_forgetting_is_not_measured(run: Any, page: Any) -> None:
    run.sources = {"python": "Domain"}
    found = page(write_report(run.write(), run.manifest()))
    assert "Held-out loss, general text\nnot measured\nthe job has no General data" in found.text
    assert found.titles == PLOTS[:-1]  # one source has no mix
    assert "General text" not in found.drawings[1]


def test_without_any_held_out_data_the_page_says_that_nothing_is_measured(
    run: Any, page: Any
) -> None:
    run.evaluate_every = 1000
    out = run.write()
    (out / "prepared" / "0123abcd" / "base-losses.json").unlink()
    found = page(write_report(out, {**run.manifest(), "metrics": {}}))
    why = "nothing of it is held out: set validation.splitPercent above 0"
    assert f"Held-out loss, domain text\nnot measured\n{why}" in found.text
    assert PLOTS[1] not in found.titles


def test_a_last_batch_that_is_filled_up_does_not_flatten_the_padding_of_the_others(
    run: Any, page: Any
) -> None:
    out = run.write()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith('{"step": 200, "loss"'))
    lines[at] = json.dumps({**run.step(200), "padding": 0.875})
    (out / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    found = page(write_report(out, run.manifest()))
    drawing = found.drawings[PLOTS.index("Waiting and padding")]
    ticks = [
        float(tick) for tick in re.findall(r"([\d.]+) % ", drawing.partition("on average.")[2])
    ]
    assert ticks
    assert max(ticks) < 10
    assert "Without the last step, whose batch is filled up: 88 % padding." in found.text


def test_a_loss_that_is_no_number_is_told_with_its_reason(run: Any, page: Any) -> None:
    manifest = run.manifest() | {"notFinite": {"heldout_domain_loss": "not a finite number"}}
    assert manifest["metrics"].pop("heldout_domain_loss")
    text = page(write_report(run.write(), manifest)).text
    assert "Notes\nheldout_domain_loss: not a finite number" in text


def test_skipped_steps_are_marked_and_counted(run: Any, page: Any) -> None:
    run.skipped = frozenset([3, 120])
    found = page(write_report(run.write(), run.manifest()))
    assert "update skipped, not finite" in found.text
    assert "2 steps were skipped." in found.drawings[PLOTS.index("Gradient norm")]


def test_a_run_of_one_step_has_a_page(run: Any, page: Any) -> None:
    run.total = run.done = run.evaluate_every = 1
    found = page(write_report(run.write(), run.manifest()))
    assert "1 of 1" in found.text
    assert found.titles == PLOTS


def test_the_page_of_a_hundred_thousand_steps_stays_small_and_keeps_a_spike(
    run: Any, page: Any
) -> None:
    run.total = run.done = 100_000
    run.evaluate_every = 100
    run.skipped = frozenset(range(1, 100_000, 7))
    out = run.write()
    lines = (out / "metrics.jsonl").read_text().split("\n")
    at = next(n for n, line in enumerate(lines) if line.startswith('{"step": 77777,'))
    lines[at] = json.dumps({**run.step(77_777), "loss": 99.5})
    (out / "metrics.jsonl").write_text("\n".join(lines))
    path = write_report(out, run.manifest())
    assert path.stat().st_size < 2_000_000
    assert "highest 99.5 at step 77777" in page(path).drawings[0]
