"""GGUF files: the policy in them is the policy they were written from, as llama.cpp would read it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from gguf import GGUFReader, GGUFWriter

from sera_core.errors import InputError
from sera_core.models import gguf_writing
from sera_core.models.gguf_check import PROBES, Refused, check_tokenizer, compare_logps, load_gguf
from sera_core.models.gguf_tokenizer import SPACE, Vocabulary, add_vocabulary, read_tokenizer, vocabulary_of
from sera_core.models.gguf_writing import context_length, interleaved, layout_of, write_gguf
from sera_core.models.logprobs import response_token_logps
from sera_core.models.policies import load_policy, load_tokenizer

ITEMS = [(list(range(3, 20)), list(range(20, 90))), (list(range(200, 205)), list(range(300, 320)))]
SIZES = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "llama": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 128}),
    "qwen2": ("qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", {"attention_bias": False}),
}


def make_model(folder: Path, kind: str, **changes: object) -> Path:
    """A random policy of an architecture, with norms and biases that are not the initial ones and zeros."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def write(folder: Path, path: Path, file_type: gguf_writing.FileType = "f32") -> Path:
    vocabulary = vocabulary_of(load_tokenizer(folder), layout_of(folder).config.vocab_size, (2,))
    write_gguf(folder, path, file_type, vocabulary, tiny.CHATML, {"sera.policy_sha256": "0" * 64})
    return path


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_computes_the_same_from_its_file(name, tmp_path):
    kind, changes = MODELS[name]
    folder = make_model(tmp_path / "policy", kind, **changes)
    read = load_gguf(write(folder, tmp_path / "policy.gguf"))
    expected, found = (response_token_logps(model, ITEMS) for model in (load_policy(folder), read))
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-4)
    if name == "mistral":
        assert (
            context_length(layout_of(folder).config) == 128
        )  # behind its window llama.cpp attends, it doesn't


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_the_reader_of_transformers_agrees(name, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / "policy", MODELS[name][0], **MODELS[name][1] | {"head_dim": 16})
    path = write(folder, tmp_path / "policy.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).eval()
    expected, found = (response_token_logps(model, ITEMS) for model in (load_policy(folder), read))
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-4)


def test_rows_of_queries_and_keys_are_interleaved_by_head():
    """Two heads of four rows: the halves 0 1 | 2 3 of the first become 0 2 1 3."""
    assert interleaved(np.arange(8.0)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, log-probabilities) of a tiny policy."""
    folder = tiny.tiny_policy(tmp_path_factory.mktemp("gguf") / "policy")
    return folder, response_token_logps(load_policy(folder), ITEMS)


@pytest.mark.parametrize(("file_type", "least"), [("f16", 1e-5), ("bf16", 1e-4), ("q8_0", 1e-3)])
def test_each_type_rounds_as_much_as_it_must(policy, tmp_path, file_type, least):
    folder, expected = policy
    read = load_gguf(write(folder, tmp_path / "policy.gguf", file_type))
    difference = compare_logps(expected, response_token_logps(read, ITEMS), file_type)
    assert least < difference.mean < difference.largest and difference.tokens == 90


def test_a_file_with_rows_in_another_order_is_refused(policy, tmp_path, monkeypatch):
    folder, expected = policy
    monkeypatch.setattr(gguf_writing, "interleaved", lambda weight, heads: weight)
    read = load_gguf(write(folder, tmp_path / "policy.gguf", "q8_0"))
    with pytest.raises(Refused, match="nats a token"):
        compare_logps(expected, response_token_logps(read, ITEMS), "q8_0")


def test_a_weight_too_large_for_f16_is_named(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    folder = tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][5, 5] = torch.tensor(7e4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"embed_tokens.*7e\+?0?4|embed_tokens.*70000"):
        write(folder, tmp_path / "policy.gguf", "f16")


def test_what_the_file_says_is_what_llama_cpp_needs(policy, tmp_path):
    reader = GGUFReader(write(policy[0], tmp_path / "policy.gguf", "q8_0"))
    read = {name: field.contents() for name, field in reader.fields.items() if "tokenizer.ggml.t" not in name}
    assert read["general.architecture"] == "llama" and read["tokenizer.chat_template"] == tiny.CHATML
    assert (read["llama.attention.head_count"], read["llama.attention.head_count_kv"]) == (2, 1)
    assert read["tokenizer.ggml.model"] == "gpt2" and read["tokenizer.ggml.pre"] == "gpt-2"
    assert [read[f"tokenizer.ggml.{name}_token_id"] for name in ("unknown", "bos", "eos", "padding")] == [
        0,
        1,
        2,
        2,
    ]
    assert read["tokenizer.ggml.add_bos_token"] is False and read["sera.policy_sha256"] == "0" * 64
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32" and "output.weight" not in types


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gpt_neox"}, "architecture 'gpt_neox' is not written"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is true"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rotary embedding of type 'yarn'",
        ),
    ],
)
def test_what_llama_cpp_would_ignore_is_refused_by_name(policy, tmp_path, changes, said):
    import shutil

    folder = Path(shutil.copytree(policy[0], tmp_path / "policy"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=said):
        layout_of(folder)


# ---------------------------------------------------------------------------------------------- tokenizers


def tokenizer_with(folder: Path, change) -> Path:
    """The tiny tokenizer, changed as the JSON of its file."""
    folder.mkdir()
    tiny.write_tokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def splitting(pattern: str | None, whole: bool):
    """Words by a pattern, or with single digits for None."""
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pattern is None,
    }
    first = {"type": "Digits", "individual_digits": True}
    if pattern is not None:
        first = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    def change(spec):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [first, level]}
        spec["model"]["ignore_merges"] = whole

    return change


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA_BPE = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEXTS = ["<|im_start|>user\nIt's 12345 o'clock<|im_end|>\n", "The capital of France is Paris; WE'LL see 42."]


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [(None, False, "smollm"), (QWEN2, False, "qwen2"), (LLAMA_BPE, True, "llama-bpe")],
)
def test_a_byte_level_tokenizer_is_named_by_how_it_splits_words(tmp_path, pattern, whole, name):
    tokenizer = load_tokenizer(tokenizer_with(tmp_path / "policy", splitting(pattern, whole)))
    vocabulary = vocabulary_of(tokenizer, tiny.VOCAB_SIZE + 3)
    assert (vocabulary.model, vocabulary.words, len(vocabulary.tokens)) == ("gpt2", name, tiny.VOCAB_SIZE + 3)
    path = only_tokenizer(tmp_path / "x.gguf", vocabulary)
    assert check_tokenizer(path, tokenizer, TEXTS) == len(TEXTS) + len(PROBES)
    fewer = tokenizer_with(tmp_path / "other", lambda spec: spec["model"].update(merges=[]))
    with pytest.raises(Refused, match="other ids"):
        check_tokenizer(path, load_tokenizer(fewer), TEXTS)


def only_tokenizer(path: Path, vocabulary: Vocabulary) -> Path:
    """A file without weights."""
    writer = GGUFWriter(path, "llama")
    add_vocabulary(writer, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def sentencepiece(folder: Path) -> Path:
    """A sentencepiece-like BPE tokenizer as Llama 2 and Mistral have it, in the tiny policy's folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    trainer = trainers.BpeTrainer(
        vocab_size=tiny.VOCAB_SIZE,
        special_tokens=[*special, *(AddedToken(f"<0x{byte:02X}>", normalized=False) for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(" ".join(tiny.SENTENCES).split(" "), trainer=trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_a_sentencepiece_tokenizer_is_written_with_scores(tmp_path):
    folder = sentencepiece(make_model(tmp_path / "policy", "mistral", sliding_window=None))
    path = write(folder, tmp_path / "policy.gguf")
    reader = GGUFReader(path)
    assert reader.fields["tokenizer.ggml.model"].contents() == "llama"
    assert reader.fields["tokenizer.ggml.token_type"].contents()[:4] == [2, 3, 3, 6]
    texts = ["</s>The answer is: 4 minutes</s> and so on", "  two spaces, naïve 漢"]
    assert check_tokenizer(path, load_tokenizer(folder), texts) == len(texts) + len(PROBES)
    assert read_tokenizer(reader).encode("The answer").tokens[0].startswith(SPACE)


def set_field(**values):
    return lambda spec: spec.update(values)


def set_added(spec):
    spec["added_tokens"][1]["lstrip"] = True


METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_field(normalizer={"type": "Lowercase"}), "normalizer is Lowercase"),
        (set_field(pre_tokenizer={"type": "Whitespace"}), 'splits words by .*"Whitespace"'),
        (set_added, "'<|im_start|>' has lstrip".replace("|", r"\|")),
        (lambda spec: spec["model"].update(ignore_merges=True), "splits words by"),
        (lambda spec: spec["model"].update(dropout=0.1), "dropout"),
        (
            lambda spec: spec.update(pre_tokenizer=METASPACE) or spec["model"].update(byte_fallback=True),
            "Metaspace",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused_by_name(tmp_path, change, said):
    tokenizer = load_tokenizer(tokenizer_with(tmp_path / "policy", change))
    with pytest.raises(InputError, match=said):
        vocabulary_of(tokenizer, tiny.VOCAB_SIZE)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path):
    tokenizer = load_tokenizer(tokenizer_with(tmp_path / "policy", lambda spec: None))
    with pytest.raises(InputError, match="has 300 embeddings"):
        vocabulary_of(tokenizer, 300)
