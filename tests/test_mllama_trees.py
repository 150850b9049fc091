"""Trees with an image: edge by edge what separate runs give, each picture through the tower once, seen by all branches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_mllama import SIDE, oracle_inputs, picture, write_mllama
from students import run_settings
from torch import Tensor

from mint import load_decoder
from mint.decoders import Decoder
from mint.errors import ConfigError, RecordError
from mint.images import open_image
from mint.training.batches import CHOSEN, PATHS, PROMPT, TokenPair, batch, split, token_pairs
from mint.training.objectives import likelihood_tokens
from mint.trees import Text, forest, token_tree, without_label
from mint.types import PreferencePair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mllama(tmp_path_factory.mktemp("mllama"), seed=2, std=0.15)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import MllamaForConditionalGeneration

    return MllamaForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Decoder:
    return load_decoder(folder, dtype="float32", device="cpu")


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Files with pictures of one, two and four tiles."""
    paths = []
    for at, size in enumerate([(SIDE, SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)]):
        picture(*size, seed=at).save(tmp_path / f"{at}.png")
        paths.append(str(tmp_path / f"{at}.png"))
    return paths


def image_pair(name: str, image: Any, question: str = "What is it?", chosen: str = "a red nose") -> PreferencePair:
    content: Any = question if image is None else [{"type": "image"}, {"type": "text", "text": question}]
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, "a red ear and a thin lip"))
    return PreferencePair(name, [{"role": "user", "content": content}], *answers, image=image)


@contextmanager
def counting(*modules: torch.nn.Module) -> Iterator[list[int]]:
    """How often these modules run inside the block."""
    runs = [0]

    def count(*_: object) -> None:
        runs[0] += 1

    hooks = [module.register_forward_hook(count) for module in modules]
    try:
        yield runs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def separate(oracle: Any, pair: TokenPair) -> list[Tensor]:
    """Log-probabilities of the tokens of prompt, chosen and rejected, each text run by itself in transformers."""
    found = []
    images = [] if pair.image is None else [open_image(pair.image)]
    for ids, first in zip((t.ids for t in pair.texts()[:3]), (1, pair.chosen_first, pair.rejected_first), strict=True):
        logp = oracle(**oracle_inputs(ids, images, oracle.config.image_token_index)).logits[0].log_softmax(-1)
        scored = [at for at in range(first, len(ids)) if ids[at] != oracle.config.image_token_index]
        found.append(torch.stack([logp[at - 1, ids[at]] for at in scored]))
    return found


def edges(tree: Any, logp: Tensor, path: int) -> Tensor:
    return logp[tree.member_edges[tree.member_paths == path]]


def made(decoder: Decoder, pairs: list[PreferencePair]) -> list[TokenPair]:
    return token_pairs(pairs, decoder.tokenizer, run_settings())


@torch.no_grad()
def test_every_edge_of_a_batch_equals_separate_runs_of_transformers(
    decoder: Decoder, oracle: Any, pictures: list[str]
) -> None:
    """Different pictures, the same one twice with two questions, and a pair without one, all in one batch."""
    pairs = made(
        decoder,
        [
            image_pair("a", pictures[1]),
            image_pair("b", pictures[0]),
            image_pair("c", None),
            image_pair("d", pictures[2]),
            image_pair("e", pictures[2], "Which is it, and why?"),
        ],
    )
    whole = batch(pairs)
    assert len(whole.tree) < whole.apart
    logp = decoder.token_logp(whole.tree)
    for number, pair in enumerate(pairs):
        for part, wanted in enumerate(separate(oracle, pair)):
            found = edges(whole.tree, logp, PATHS * number + part)
            assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_picture_goes_through_the_tower_once_for_all_that_see_it(
    decoder: Decoder, pictures: list[str], tmp_path: Path
) -> None:
    open_image(pictures[2]).save(tmp_path / "copy.png")  # another file, the same picture
    model = decoder.network.model
    looking = [layer for layer in model.language_model.layers if hasattr(layer, "cross_attn")]
    cases = [(pictures[:1], 1), (pictures, 3), ([pictures[2], str(tmp_path / "copy.png"), pictures[2]], 1)]
    for images, once in cases:
        pairs = made(decoder, [image_pair(str(at), image) for at, image in enumerate(images)])
        tree = batch(pairs).tree
        keys = [layer.cross_attn.k_proj for layer in looking]
        with counting(model.vision_model) as towers, counting(*keys) as projections:
            decoder.hidden(tree)
        assert towers == [once]
        assert projections == [len(looking)]


def test_a_picture_goes_through_the_tower_once_for_all_tokens_generated(decoder: Decoder, pictures: list[str]) -> None:
    ids = made(decoder, [image_pair("a", pictures[1])])[0]
    prompt = ids.chosen[: ids.chosen_first]
    model = decoder.network.model
    keys = [layer.cross_attn.k_proj for layer in model.language_model.layers if hasattr(layer, "cross_attn")]
    with counting(model.vision_model) as towers, counting(*keys) as projections:
        written = decoder.generate([prompt, prompt], 8, images=[[pictures[1]], [pictures[1]]])
    assert len(written[0]) > 2
    assert towers == [1]
    assert projections == [len(keys)]


@torch.no_grad()
def test_padding_takes_no_part_outside_the_text_before_the_image(decoder: Decoder, pictures: list[str]) -> None:
    """With the image first only the tiles that are there have keys; text before it needs those of all tiles."""
    pair = made(decoder, [image_pair("a", pictures[0])])[0]
    ids = pair.chosen[: pair.chosen_first]
    assert decoder.eyes is not None
    patches = decoder.network.config.vision.patches
    for texts, tiles in ((ids, 4), (ids[ids.index(pair.image_token) :], 1)):
        sight = decoder.eyes.look(token_tree([Text([*texts, 1])], (pictures[0],)))
        assert sight is not None
        assert len(sight.states) == tiles * patches


def test_an_image_on_a_branch_is_refused(decoder: Decoder, pictures: list[str]) -> None:
    token = decoder.network.config.image_token
    for other in (5, 277):  # the branch with the image comes last, or first
        tree = token_tree([Text([1, 2, token - 5, token, 3, 4]), Text([1, 2, other, 6])], (pictures[0],))
        with pytest.raises(ConfigError, match="an image token on a branch"):
            decoder.hidden(tree)


def test_a_tree_with_too_few_images_is_refused(decoder: Decoder, pictures: list[str]) -> None:
    token = decoder.network.config.image_token
    tree = token_tree([Text([1, token, 3, 4, token, 6, 7])], (pictures[0],))
    with pytest.raises(ConfigError, match="1 images for 2 image tokens"):
        decoder.hidden(tree)


# ---- batches ------------------------------------------------------------------------------------------------------


def test_edges_to_a_token_that_is_never_predicted_are_taken_out() -> None:
    tree = token_tree([Text([1, 9, 2, 3]), Text([1, 9, 2, 4, 5], 3)])
    kept = without_label(tree, 9)
    assert kept.labels.tolist() == [label for label in tree.labels.tolist() if label != 9]
    assert kept.path_lengths().tolist() == [2, 2]
    values = torch.arange(len(tree.labels)) + 1.0
    wanted = tree.path_sums(values) - torch.tensor([values[tree.labels == 9].item(), 0])
    assert torch.equal(kept.path_sums(values[tree.labels != 9]), wanted)
    assert torch.equal(kept.ids, tree.ids)


def test_no_batch_asks_for_an_image_token_to_be_predicted(decoder: Decoder, pictures: list[str]) -> None:
    pairs = made(decoder, [image_pair("a", pictures[0]), image_pair("b", None)])
    whole = batch(pairs)
    assert decoder.network.config.image_token in whole.tree.ids
    assert int(whole.tree.labels.max()) < decoder.network.config.vocab_size
    scored = whole.tree.path_lengths().view(-1, PATHS)
    assert likelihood_tokens(pairs, run_settings()) == int(scored[:, [PROMPT, CHOSEN]].sum())


def test_pairs_of_one_picture_share_their_prompt_and_others_do_not(decoder: Decoder, pictures: list[str]) -> None:
    same = made(decoder, [image_pair("a", pictures[0]), image_pair("b", pictures[0], chosen="a blue nose")])
    other = made(decoder, [image_pair("a", pictures[0]), image_pair("b", pictures[1], chosen="a blue nose")])
    assert len(batch(same).tree.images) == 1
    assert batch(other).tree.images == (pictures[0], pictures[1])
    lengths = [len(batch([pair]).tree) for pair in other]
    assert len(batch(other).tree) == sum(lengths)
    assert len(batch(same).tree) < sum(lengths) - same[0].chosen_first + 5


def test_paths_stay_in_the_order_of_the_pairs(decoder: Decoder, pictures: list[str]) -> None:
    pairs = made(
        decoder, [image_pair(str(at), image) for at, image in enumerate([pictures[0], None, pictures[0], None])]
    )
    tree = batch(pairs).tree
    alone = forest([batch([pair]).tree for pair in pairs])
    assert torch.equal(tree.path_lengths(), alone.path_lengths())
    assert torch.equal(tree.labels[tree.member_edges], alone.labels[alone.member_edges])


def test_a_picture_counts_in_a_batch_as_the_tokens_that_the_tower_makes_of_it(
    decoder: Decoder, pictures: list[str]
) -> None:
    pairs = made(decoder, [image_pair(str(at), image) for at, image in enumerate([*pictures, None])])
    assert decoder.picture_tokens == 4 * 8
    room = max(pair.size for pair in pairs) * 4
    assert [len(group) for group in split(pairs, room)] == [4]
    assert [len(group) for group in split(pairs, room, room)] == [1, 1, 1, 1]


def test_a_pair_whose_image_and_places_do_not_fit_is_named(decoder: Decoder, pictures: list[str]) -> None:
    strings = PreferencePair("strings", "What is it?", " a nose", " an ear", image=pictures[0])
    whole = image_pair("whole", pictures[0])
    lost = PreferencePair("lost", whole.prompt, whole.chosen, whole.rejected)
    typed = image_pair("typed", pictures[0], "Is <|image|> a nose?")
    long = image_pair("long", pictures[0], "word " * 60)
    for pair, named in ((strings, "0 places"), (lost, "the pair has 0"), (typed, "a text holds <|image|>")):
        with pytest.raises(RecordError, match=f"pair '{pair.id}': .*{named}".replace("|", r"\|")):
            made(decoder, [pair])
    with pytest.raises(RecordError, match="pair 'long': its image is cut off"):
        token_pairs([long], decoder.tokenizer, run_settings(max_length=60))
    skipped: list[str] = []
    kept = token_pairs([strings, image_pair("good", pictures[0])], decoder.tokenizer, run_settings(), skipped)
    assert [pair.id for pair in kept] == ["good"]
    assert len(skipped) == 1


def test_a_model_that_reads_text_alone_refuses_a_pair_with_an_image(tmp_path: Path, pictures: list[str]) -> None:
    from checkpoints import write_llama

    text = load_decoder(write_llama(tmp_path / "llama"), dtype="float32", device="cpu")
    with pytest.raises(RecordError, match=r"pair 'a': .*an image for a model that reads text alone"):
        made(text, [image_pair("a", pictures[0])])
    with pytest.raises(RecordError, match="pair 's': 0 places for images"):
        made(text, [PreferencePair("s", "What?", " a nose", " an ear", image=pictures[0])])
    with pytest.raises(ConfigError, match="reads text alone"):
        text.logits([[1, 2, 3]], [[pictures[0]]])
