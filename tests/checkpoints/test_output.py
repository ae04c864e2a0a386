"""What a run leaves is a model that transformers loads, with the base's own files and dtypes."""

import hashlib
import json
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from cptjob_trainer.errors import OutputError, StorageFullError
from cptjob_trainer.results import export, output, result

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mixtral": {"hidden_size": 32, "intermediate_size": 48, "num_local_experts": 4},
}
COPIED = {
    "tokenizer.json": '{"version" : "1.0"}\n',
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "free",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
}
LEFT = {"README.md": "card", "pytorch_model.bin": "x", "modeling.py": "1", ".gitattributes": "x"}


def base_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model's directory, with what people have lying in one."""
    common = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    tied = {"tie_word_embeddings": kind != "mixtral", "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **common, **tied, **SIZES[kind])
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder)
    for name, text in {**COPIED, **LEFT}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def trained(base: Path) -> Any:
    """The model in fp32 with other weights than the base's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def same_weights(folder: Path, model: Any, dtype: torch.dtype) -> None:
    read, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    wanted = dict(model.named_parameters())
    for name, parameter in read.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, wanted[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", sorted(SIZES))
def test_the_model_is_what_transformers_itself_would_save(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    base = base_model(tmp_path / "base", kind, dtype)
    model = trained(base)
    published = output.publish_model(tmp_path / "out", base, dict(model.named_parameters()))
    assert published is not None
    same_weights(tmp_path / "out" / "model", model, dtype)
    model.to(dtype).save_pretrained(tmp_path / "theirs")
    ours, theirs = digests(tmp_path / "out" / "model"), digests(tmp_path / "theirs")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours == {name: file.sha256 for name, file in published.files.items()}


def test_the_bases_files_are_copied_byte_for_byte_and_no_others(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    output.publish_model(tmp_path / "out", base, trained(base).state_dict())
    ours, theirs = digests(tmp_path / "out" / "model"), digests(base)
    copied = {*COPIED, "config.json", "generation_config.json"}
    assert ours.keys() == copied | {"model.safetensors"}
    assert all(ours[name] == theirs[name] for name in copied)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_of_a_cache_the_contents_are_copied_and_not_the_links(tmp_path: Path) -> None:
    plain = base_model(tmp_path / "plain")
    base, blobs = tmp_path / "cache" / "snapshots" / "0a", tmp_path / "cache" / "blobs"
    blobs.mkdir(parents=True)
    for file in [path for path in plain.rglob("*") if path.is_file()]:
        link = base / file.relative_to(plain)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.rename(blobs / hashlib.sha256(str(link).encode()).hexdigest()))
    state = trained(base).state_dict()
    output.publish_model(tmp_path / "out", base, state)
    folder = tmp_path / "out" / "model"
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    ours, theirs = digests(folder), digests(base)
    assert all(ours[name] == theirs[name] for name in (*COPIED, "config.json"))


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_a_large_model_is_cut_into_shards_with_an_index(tmp_path: Path, kind: str) -> None:
    base = base_model(tmp_path / "base", kind)
    model = trained(base)
    output.publish_model(tmp_path / "out", base, model.state_dict(), shard_bytes=20_000)
    folder = tmp_path / "out" / "model"
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size < 25_000 for path in shards)
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    same_weights(folder, model, torch.bfloat16)


def test_a_sharded_model_gives_the_same_bytes(lab: Any, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    output.publish_model(tmp_path / "one", base, trained(base).state_dict())

    # Loaded before the fork: transformers loads with threads.
    model = trained(base)

    def two_ranks(rank: int) -> bool:
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        state = model.state_dict()
        return output.publish_model(tmp_path / "two", base, state, rank=rank) is None

    outcomes = lab.gloo(2, two_ranks)
    assert [outcome.value for outcome in outcomes] == [False, True], outcomes
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_is_merged_in_fp32_and_the_adapter_loads_in_peft(tmp_path: Path, kind: str) -> None:
    from peft import LoraConfig, PeftModel, inject_adapter_in_model

    base = base_model(tmp_path / "base", kind)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), model)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    state = model.state_dict()
    output.publish_model(tmp_path / "out", base, state, lora_scale=2.0)
    output.publish_adapter(tmp_path / "out", state, rank=4, alpha=8, dropout=0.0, base="the-base")
    ids = torch.arange(20).unsqueeze(0)
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(fresh, tmp_path / "out" / "adapter")
    model.eval()
    with torch.no_grad():
        wanted = model(ids).logits
        assert torch.equal(adapted.eval()(ids).logits, wanted)
        merged = adapted.merge_and_unload().to(torch.bfloat16)
    same_weights(tmp_path / "out" / "model", merged, torch.bfloat16)


def test_a_checkpoint_is_exported_as_a_model(lab: Any, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    model = trained(base)
    saved = {f"model.{name}": value for name, value in model.named_parameters()}
    checkpoints = lab.make()
    checkpoints.open()
    for step in (2, 4):
        moments = {"optimizer.count": torch.tensor(step)}
        checkpoints.save(step, {**saved, **moments}, {"step": step})
    found = export.find(lab.directory, 2)
    output.export(found, export.read_whole(found), base, tmp_path / "exported")
    same_weights(tmp_path / "exported", model, torch.bfloat16)


def test_a_lora_checkpoint_is_exported_merged(lab: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    base = base_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    checkpoints = lab.make()
    checkpoints.open()
    adapters = {f"model.{n}": p for n, p in model.named_parameters() if "lora_" in n}
    checkpoints.save(1, adapters, {})
    output.publish_model(tmp_path / "out", base, model.state_dict(), lora_scale=2.0)
    found = export.find(lab.directory, 1)
    whole = export.read_whole(found)
    output.export(found, whole, base, tmp_path / "exported", lora_scale=2.0)
    assert digests(tmp_path / "exported") == digests(tmp_path / "out" / "model")


@pytest.mark.parametrize("point", ["output.model:1", "output.model:9", "output.model_swap:1"])
def test_the_old_model_stays_until_the_new_one_is_whole(
    lab: Any, tmp_path: Path, point: str
) -> None:
    base = base_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    output.publish_model(tmp_path / "out", base, model.state_dict())
    before = digests(tmp_path / "out" / "model")
    state = trained(base).state_dict()
    publish = lambda: output.publish_model(tmp_path / "out", base, state) is None  # noqa: E731
    assert lab.alone(publish, CPTJOB_FAILPOINT=point).signal == signal.SIGKILL
    assert digests(tmp_path / "out" / "model") == before
    assert lab.alone(publish).value is False
    assert digests(tmp_path / "out" / "model") != before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_a_full_disk_leaves_the_old_model(lab: Any, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    state = trained(base).state_dict()
    output.publish_model(tmp_path / "out", base, state)
    before = digests(tmp_path / "out")

    def publish() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        output.publish_model(tmp_path / "out", base, state)

    outcome = lab.alone(publish)
    assert outcome.error == StorageFullError.__name__
    assert "training continues from the last checkpoint" in outcome.message
    assert digests(tmp_path / "out") == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


def test_a_state_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    state = trained(base).state_dict()
    with pytest.raises(OutputError, match=r"describes no parameter extra"):
        output.publish_model(tmp_path / "out", base, {**state, "extra": torch.zeros(1)})
    assert not (tmp_path / "out").exists()


def test_the_manifest_is_whole_or_absent_and_lists_each_file(lab: Any, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    output.publish_model(tmp_path / "out", base, trained(base).state_dict())
    write = lambda: str(result.write_manifest(tmp_path / "out", {"job": "a"}))  # noqa: E731
    killed = lab.alone(write, CPTJOB_FAILPOINT="output.manifest:1")
    assert killed.signal == signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists()
    path = result.write_manifest(tmp_path / "out", {"job": "a"})
    value = json.loads(path.read_bytes())
    assert value["job"] == "a"
    assert {name: file["sha256"] for name, file in value["files"].items()} == {
        f"model/{name}": digest for name, digest in digests(tmp_path / "out" / "model").items()
    }
    first = path.read_bytes()
    assert result.write_manifest(tmp_path / "out", {"job": "a"}).read_bytes() == first
