"""A special token that the data spells changes the ids of nothing round it."""

import json

import pytest
from tiny import CHATML, write_tokenizer

from sera_core.data.rendering import Renderer

SPELLED, ORDINARY = "say <|im_end|> please", "say it please"
KINDS = ["byte-level", "rstrip", "lstrip", "both", "metaspace", "prepended"]
SPECIALS = ("<unk>", "<|im_start|>", "<|im_end|>")


def sentencepiece(folder, prepended):
    """A tokenizer that writes ▁ before whole texts, or before every piece (Llama's older form)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = sorted(set("user\nassistant say it please <|im_end|> two lines. Paris▁"))
    words = [*dict.fromkeys([*SPECIALS, "▁", *letters, "▁s", "▁p"])]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=[("▁", "s"), ("▁", "p")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if prepended:
        parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(parts)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS[1:]])
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture(params=KINDS)
def renderer(request, tmp_path):
    """A tokenizer that adds to the start of a text, or whose special tokens take white space with them."""
    write_tokenizer(tmp_path, CHATML)
    file, kind = tmp_path / "tokenizer.json", request.param
    if kind in ("metaspace", "prepended"):
        sentencepiece(tmp_path, kind == "prepended")
    held = json.loads(file.read_text())
    for token in held["added_tokens"]:
        if token["content"] in SPECIALS:
            token["rstrip"], token["lstrip"] = kind in ("rstrip", "both"), kind in ("lstrip", "both")
    file.write_text(json.dumps(held))
    return Renderer(tmp_path)


def turns(*contents):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(contents)]


def behind(ids, end, count):
    """What stands behind the count-th end of turn."""
    places = [place for place, token in enumerate(ids) if token == end]
    return ids[places[count - 1] :]


def test_turns_round_a_spelled_special_token_keep_their_ids(renderer):
    """Behind the first turn everything is as beside an ordinary one: spaces, line breaks and all."""
    rest = ("  two\nlines. ", " please ")
    end = renderer.end_of_turn_id
    spelled = renderer.prompt_ids(turns(SPELLED, *rest))
    ordinary = renderer.prompt_ids(turns(ORDINARY, *rest))
    assert spelled.count(end) == ordinary.count(end) == 3
    assert behind(spelled, end, 1) == behind(ordinary, end, 1)


def test_turns_before_a_spelled_special_token_keep_their_ids(renderer):
    end = renderer.end_of_turn_id
    spelled = renderer.prompt_ids(turns("  two\nlines. ", " please", SPELLED))
    ordinary = renderer.prompt_ids(turns("  two\nlines. ", " please", ORDINARY))
    shared = len(ordinary) - len(behind(ordinary, end, 2))
    assert spelled[:shared] == ordinary[:shared]


def test_a_piece_of_text_is_written_alike_on_both_paths(renderer):
    """The turn's own beginning, up to the spelled token, is that of the ordinary one."""
    spelled, ordinary = (renderer.response_ids(turns("please"), text) for text in (SPELLED, ORDINARY))
    count = len(renderer.response_ids(turns("please"), "say")) - 1
    assert spelled[:count] == ordinary[:count]
    assert spelled[-1] == ordinary[-1] == renderer.end_of_turn_id
