"""A tokenizer as GGUF metadata, as llama.cpp reads it, and back.

llama.cpp has two tokenizers that this project writes. `gpt2` is byte-level BPE: vocabulary, merges, and the
name of a rule that splits text into words before merging. `llama` is sentencepiece's BPE: a score for each
token instead of merges, and bytes for unknown characters. A tokenizer with any other part is refused, because
llama.cpp would ignore that part and give other ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sera_core.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's token types. CONTROL: special tokens; USER_DEFINED: added tokens that are not special."""
SPACE = "▁"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_PLAIN_BYTES = _BYTES | {"use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


@dataclass(frozen=True)
class _Words:
    """How llama.cpp splits a text into words under one name, as steps of the tokenizers library."""

    name: str
    steps: tuple[dict[str, Any], ...]
    whole_words: bool = False
    """Whether a word in the vocabulary is one token, whatever the merges give."""


_DIGITS = {"type": "Digits", "individual_digits": True}
_WORDS = (
    _Words("gpt-2", (_BYTES,)),
    _Words("smollm", (_DIGITS, _BYTES)),
    _Words("qwen2", (_split(_QWEN2), _PLAIN_BYTES)),
    _Words("llama-bpe", (_split(_LLAMA3), _PLAIN_BYTES), whole_words=True),
    _Words("tekken", (_split(_TEKKEN), _PLAIN_BYTES), whole_words=True),
)
_LIKE = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "default": "gpt-2"}
"""Names of rules that split as another one (`default`: as older files of gpt-2 tokenizers name it)."""
WORDS = {rule.name: rule for rule in _WORDS}


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in llama.cpp's terms."""

    model: str
    """`gpt2` or `llama`."""
    words: str
    """Name of the rule that splits a text into words; `default` for `llama`."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Of `gpt2`: two tokens with a space between, the first merge first."""
    scores: list[float]
    """Of `llama`: the pair whose token has the largest score is merged first."""
    space_first: bool
    """Of `llama`: whether a space stands before a text and after each special token."""
    special: dict[str, int]
    """Ids of bos, eos, eot, unk and pad, as far as they exist."""
    add_bos: bool
    add_eos: bool


def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int, stops: Sequence[int] = ()) -> Vocabulary:
    """The tokenizer in llama.cpp's terms.

    Args:
        tokenizer: a tokenizer of the tokenizers library.
        size: number of rows of the model's embedding; rows without a token get a name.
        stops: ids that end an answer; the first that is not the tokenizer's eos becomes eot.

    Raises:
        InputError: llama.cpp has no such tokenizer; the message names the part that it lacks.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} is not one of the tokenizers library")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise _refused(f"its model is {spec['model']['type']}, not BPE")
    _check_added(spec["added_tokens"])
    tokens, types = _tokens(backend, spec, size)
    common: dict[str, Any] = {"tokens": tokens, "types": types, "special": _special(tokenizer, stops)}
    common |= dict(zip(("add_bos", "add_eos"), _adds(tokenizer), strict=True))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    if spec["model"].get("byte_fallback"):
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in spec["model"]["merges"]]
        common |= {"space_first": _space_first(spec), "scores": _scores(tokens, pairs)}
        return Vocabulary("llama", "default", merges=[], **common)
    return Vocabulary("gpt2", _words_of(spec), merges=merges, scores=[], space_first=False, **common)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Add it to a file's metadata."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.words)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_first)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)


def read_tokenizer(reader: GGUFReader) -> Tokenizer:
    """The tokenizer of a GGUF file, as llama.cpp reads it, without a start token.

    Raises:
        InputError: another tokenizer than those that are written here.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    def field(name: str, default: Any = None) -> Any:
        found = reader.get_field(f"tokenizer.ggml.{name}")
        return default if found is None else found.contents()

    tokens, types = field("tokens"), field("token_type")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if field("model") == "llama":
        merges = list(_merges(vocabulary, field("scores"), types))
        model = models.BPE(
            vocab=vocabulary, merges=merges, unk_token=tokens[field("unknown_token_id")],
            fuse_unk=True, byte_fallback=True,
        )  # fmt: skip
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = _spaces(field("add_space_prefix", True))
    else:
        rule = words_rule(field("pre", "default"))
        merges = [tuple(merge.split(" ")) for merge in field("merges")]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule.whole_words))
        tokenizer.pre_tokenizer = _pre_tokenizer(rule)
        tokenizer.decoder = decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        own = [token for token, found in zip(tokens, types, strict=True) if found == kind]
        add([AddedToken(token, normalized=False) for token in own])
    return tokenizer


def words_rule(name: str) -> _Words:
    """The rule of this name.

    Raises:
        InputError: it is not known here.
    """
    rule = WORDS.get(_LIKE.get(name, name))
    if rule is None:
        raise InputError(f"the GGUF pre-tokenizer {name!r} is unknown: use the model as safetensors.")
    return rule


# --------------------------------------------------------------------------------------------- reading one


def _refused(why: str) -> InputError:
    return InputError(
        f"no GGUF file of this policy: llama.cpp cannot read its tokenizer: {why}; export it without --gguf"
    )


def _check_added(added: list[dict[str, Any]]) -> None:
    for token in added:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise _refused(f"the added token {token['content']!r} has {flag}")


def _tokens(backend: Any, spec: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and llama.cpp's type of every row of the embedding."""
    by_id = {index: token for token, index in backend.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= size:
        raise _refused(f"it has the id {max(by_id)}, but the model has {size} embeddings")
    added = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in spec["added_tokens"]}
    pieces = spec["model"].get("byte_fallback")
    unknown = spec["model"]["vocab"].get(spec["model"].get("unk_token"))

    def kind(index: int, token: str) -> int:
        if pieces and index == unknown:
            return UNKNOWN
        if pieces and index not in added and len(token) == 6 and token.startswith("<0x"):
            return BYTE
        return added.get(index, NORMAL)

    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    types = [kind(index, token) if index in by_id else UNUSED for index, token in enumerate(tokens)]
    return tokens, types


def _special(tokenizer: Any, stops: Sequence[int]) -> dict[str, int]:
    eos = tokenizer.eos_token_id
    eos = next(iter(stops), None) if eos is None else eos
    found = {"bos": tokenizer.bos_token_id, "eos": eos, "unk": tokenizer.unk_token_id}
    found |= {"pad": tokenizer.pad_token_id, "eot": next((stop for stop in stops if stop != eos), None)}
    return {name: index for name, index in found.items() if index is not None}


def _adds(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer itself puts a start token before a text, and an end token behind it."""
    plain, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    for before in (False, True):
        for behind in (False, True):
            first, last = [tokenizer.bos_token_id] * before, [tokenizer.eos_token_id] * behind
            if whole == [*first, *plain, *last]:
                return before, behind
    raise _refused(f"it adds the special tokens {whole} to the text {plain}")


def _words_of(spec: dict[str, Any]) -> str:
    """The name of the rule by which a byte-level tokenizer splits a text."""
    model = spec["model"]
    for part in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(part):
            raise _refused(f"its BPE model has {part}")
    if spec["normalizer"] is not None and spec["normalizer"]["type"] != "NFC":  # llama.cpp leaves NFC out
        raise _refused(f"its normalizer is {spec['normalizer']['type']}")
    steps = _steps(spec["pre_tokenizer"])
    for rule in _WORDS:
        if list(rule.steps) == steps and rule.whole_words == bool(model.get("ignore_merges")):
            return rule.name
    raise _refused(f"it splits words by {json.dumps(steps)[:300]}, which has no name in llama.cpp")


def _steps(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a pre-tokenizer, without what does not change ids."""
    steps = [] if pre is None else pre.get("pretokenizers", [pre])
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def _space_first(spec: dict[str, Any]) -> bool:
    """Whether a sentencepiece tokenizer puts a space before a text and after each special token."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if pre is None and normalizer == replace:
        return False
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else []
    if pre is None and steps == [{"type": "Prepend", "prepend": SPACE}, replace]:
        return True
    if normalizer is None and pre and pre["type"] == "Metaspace" and not pre.get("split"):
        if pre["prepend_scheme"] == "never":
            return False
        # llama.cpp has the space after each special token too, and before a text that begins with one
        raise _refused(f"its Metaspace puts a space before the text ({pre['prepend_scheme']})")
    raise _refused(f"its normalizer {normalizer} with its pre-tokenizer {pre} is unknown")


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """A score for each token, larger for a token that is merged earlier."""
    rank: dict[str, int] = {}
    for number, (left, right) in enumerate(merges):
        rank.setdefault(left + right, number)
    return [-float(rank[token]) if token in rank else -float(len(merges)) for token in tokens]


# --------------------------------------------------------------------------------------------- and back


def _merges(
    vocabulary: dict[str, int], scores: Sequence[float], types: Sequence[int]
) -> Iterator[tuple[str, str]]:
    """Every pair of tokens whose text together is a token: the largest score first, then the shorter left."""
    normal = [token for token, index in vocabulary.items() if types[index] == NORMAL and len(token) > 1]
    for token in sorted(normal, key=lambda token: -scores[vocabulary[token]]):
        for at in range(1, len(token)):
            if token[:at] in vocabulary and token[at:] in vocabulary:
                yield token[:at], token[at:]


def _spaces(first: bool) -> Any:
    from tokenizers import normalizers

    replace = normalizers.Replace(" ", SPACE)
    return normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if first else replace


def _pre_tokenizer(rule: _Words) -> Any:
    from tokenizers import Regex, pre_tokenizers

    def made(step: dict[str, Any]) -> Any:
        if step["type"] == "Split":
            return pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), behavior="isolated")
        if step["type"] == "Digits":
            return pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"])

    return pre_tokenizers.Sequence([made(step) for step in rule.steps])
