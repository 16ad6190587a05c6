"""Every causal architecture of transformers, tiny and random: scorer and trainer against a plain loop.

    python -m tests.benchmarks.architectures [NAME …]   # a table and counts; exit 1 if any value is wrong

A model is built from its configuration class with sizes cut down, dropout 0.3 and a window of 16 tokens, and
computes items on both sides of the window. A value is right within 1e-4 nats of one forward pass an item.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import warnings
from collections import Counter
from typing import Any

LIMIT_SECONDS = 60
NATS = 1e-4
WINDOW = 16
DROPOUT = 0.3
"""In every configuration, however it is applied: the trainer has to switch it off."""
VOCABULARY = 320

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "n_inner": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "attention_window_size": WINDOW,
    "window_size": WINDOW,
    "index_topk": WINDOW,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "n_codes": 32,
    "max_target_positions": 128,
    "max_source_positions": 128,
    "max_seq_len": 128,
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "lru_width": 64,
    "mamba_d_state": 16,
    "state_size": 16,
    "ssm_state_size": 16,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""What a setting of this name becomes wherever a configuration has it as a number."""
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4],
    "long_factor": [4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0],
    "original_max_position_embeddings": 24,
}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "diffllama": {"attention_dropout": 0.0},  # it takes no other rate
    "phi3:longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24},
}
"""What an architecture needs beyond `SIZES`; a name behind a colon is a second configuration of it."""


def names() -> list[str]:
    """Every model type with a causal language model, and the second configurations."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in OWN if ":" in name)]


# ------------------------------------------------------------------------------------------------ building


def tiny_config(name: str, dropout: float = DROPOUT) -> Any:
    """The configuration of a model type with everything small, and every dropout rate as given."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made = CONFIG_MAPPING[name.split(":")[0]]
    return made(**{**small(made(), dropout), **OWN.get(name, {})})


def small(config: Any, dropout: float) -> dict[str, Any]:
    """Small values of the settings a configuration has, its parts included."""
    settings: dict[str, Any] = {}
    given = config.to_dict()
    mapped = getattr(config, "attribute_map", {})
    for name, value in given.items():
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            settings[name] = min(SIZES[name], value) if name in ("n_group", "topk_group") else SIZES[name]
        elif any(part in name for part in ("dropout", "pdrop", "layerdrop", "drop_prob")):
            if isinstance(value, float):
                settings[name] = dropout
        elif "jitter" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name in SPECIAL and name not in mapped:
            settings[name] = SPECIAL[name]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            settings[name] = 3 + sum(map(ord, name)) % 20
        elif name == "layer_types" and isinstance(value, list):
            settings[name] = [value[number] for number in spread(value, 4)]
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:  # a key for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    for part in getattr(config, "sub_configs", {}):
        inner = getattr(config, part, None)
        if inner is not None and hasattr(inner, "to_dict"):
            settings[part] = {"model_type": inner.model_type, **small(inner, dropout)}
    return settings


def spread(kinds: list[str], count: int) -> list[int]:
    """Places of `count` layers that show every kind there is, in the order of the model."""
    first = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    rest = [place for place in range(len(kinds)) if place not in first]
    return sorted([*first, *rest][:count])


def tiny_model(name: str, dropout: float = DROPOUT) -> Any:
    """A model in eval mode whose weights are large enough that faults show in nats."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name, dropout))
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.ndim >= 2 and not parameter.std() > 0.05
            if flat or not bool(torch.isfinite(parameter).all()):
                parameter.normal_(0, 0.15)
    return model.float().eval()


# ---------------------------------------------------------------------------------------------- comparing


def pairs_of(model: Any) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected): inside the window, across it in the response, and in the prompt."""
    import torch

    named = {
        v
        for c in (model.config, model.config.get_text_config())
        for v in c.to_dict().values()
        if isinstance(v, int)
    }
    words = [token for token in range(30, 300) if token not in named]
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return [words[place] for place in torch.randint(0, len(words), (count,), generator=draw).tolist()]

    return [
        (ids(20), ids(12), ids(5)),
        (ids(3), ids(30), ids(4)),
        (ids(40), ids(8), ids(2)),
        (ids(4), ids(5), ids(6)),
    ]


def plain(model: Any, prompt: list[int], response: list[int]) -> float:
    """log π(y|x) from the logits of one pass."""
    import torch

    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(response))


def answer(name: str) -> dict[str, Any]:
    """What became of one architecture: `built`, and how scorer and trainer ran and how far off."""
    try:
        model = tiny_model(name)
    except Exception as error:
        return {"built": False, "why": short(error)}
    found: dict[str, Any] = {"built": True}
    for part, run in (("scorer", scorer), ("trainer", trainer)):
        found[part] = outcome(run, model)
    return found


def outcome(run: Any, model: Any) -> dict[str, Any]:
    """`agree`, `wrong`, `refused` or `error`, with how or why."""
    from sera_core.errors import InputError

    try:
        how, difference = run(model)
    except InputError as error:
        return {"what": "refused", "how": str(error)}
    except Exception as error:
        return {"what": "error", "how": short(error)}
    return {"what": "agree" if difference <= NATS else "wrong", "how": how, "nats": difference}


def short(error: Exception) -> str:
    """One line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]


def scorer(model: Any) -> tuple[str, float]:
    """(mode, largest difference in nats) of the scorer."""
    import numpy as np

    from sera_core.models.logprobs import scoring_mode, sequence_logps

    items = [(prompt, side) for prompt, *sides in pairs_of(model) for side in sides]
    found = sequence_logps(model, items)  # first: what has no plain pass is to be refused
    right = np.array([plain(model, *item) for item in items])
    modes = scoring_mode(model), scoring_mode(model, 48)
    return " → ".join(dict.fromkeys(modes)), float(np.abs(found - right).max())


def trainer(model: Any) -> tuple[str, float]:
    """(way, largest difference in nats) of the trainer's forward, gradients included."""
    import numpy as np
    import torch

    from sera_core.models.architecture import refuse_beyond_index_topk
    from sera_core.models.dropout import disable_dropout
    from sera_core.models.logprobs import scoring_mode
    from tasks.engines.pair_forward import PairCollator, add_pair_forward, can_share_prompt, packed_length

    disable_dropout(model)
    pairs = pairs_of(model)
    refuse_beyond_index_topk(model, max(len(p) + max(len(w), len(z)) for p, w, z in pairs))
    scoring_mode(model)  # what cannot be scored is not trained either
    rows = [
        {"row": number, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        | {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0, "label_smoothing": 0.0}
        for number, (prompt, chosen, rejected) in enumerate(pairs)
    ]
    share = can_share_prompt(model, max(map(packed_length, rows)))
    right = np.array([[plain(model, prompt, side) for side in sides] for prompt, *sides in pairs])
    add_pair_forward(model)
    model.train()
    found = np.full(right.shape, np.nan)
    for micro in PairCollator(3, share)(rows):
        labels = torch.where(micro["completion_mask"].bool(), micro["input_ids"], -100)
        log_probs = model(labels=labels, **micro).log_probs.sum(1)
        log_probs.sum().backward()
        found[micro["row"].numpy()] = log_probs.detach().view(2, -1).T.numpy()
    assert any(p.grad is not None and bool((p.grad != 0).any()) for p in model.parameters()), "no gradient"
    return "shared" if share else "apart", float(np.abs(found - right).max())


# ------------------------------------------------------------------------------------------------- running


def apart(name: str) -> dict[str, Any]:
    """`answer` in a process of its own, ended after a minute."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(answer(name)))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(LIMIT_SECONDS) else {"built": False, "why": "over a minute"}
    except EOFError:
        found = {"built": False, "why": f"the process ended by itself ({process.exitcode})"}
    process.kill()
    process.join()
    return found


def main() -> int:
    """Print the table; 1 if a value was wrong or a fault had no name."""
    import torch
    import transformers
    import trl.trainer.utils  # noqa: F401  (once, before the processes)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts: Counter[str] = Counter()
    for name in sys.argv[1:] or names():
        found = apart(name)
        counts["built" if found["built"] else "not built"] += 1
        if not found["built"]:
            print(f"{name:26} not built  {found['why']}", flush=True)
            continue
        for part in ("scorer", "trainer"):
            result = found[part]
            counts[f"{part} {result['what']}"] += 1
            nats = f"{result['nats']:.1e}" if "nats" in result else ""
            print(f"{name:26} {part:8} {result['what']:8} {nats:8} {result['how']}", flush=True)
    print(json.dumps(counts, indent=1))
    return int(any(counts[f"{part} {what}"] for part in ("scorer", "trainer") for what in ("wrong", "error")))


if __name__ == "__main__":
    sys.exit(main())
