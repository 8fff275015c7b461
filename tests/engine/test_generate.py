"""Generation: held against plain loops without a cache, and against models that are known to say one thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.config import Student
from engine.errors import DataError, KdError, ModelError
from engine.generate import STOPS, Completion, Generator, Sampling, batch_seed
from engine.models import CausalLM, load_student
from tests.engine.model_fixtures import save_gpt2, save_llama, save_model, save_qwen2

VOCABULARY = 272
CONTEXT = 128
END, START = "<|end|>", "<|start|>"
PROMPTS = ("def f(x):", "a", "class Stack with a long beginning that goes on", "return x + 1")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def byte_tokenizer(path: Path, *, begins: bool = False, ends: bool = False) -> Path:
    """A token a byte, four merges, and two control tokens; `begins` and `ends` put them around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ċ", "ĠĠĠĠ"), ("Ċ", "d")]
    pieces = [*alphabet, *(one + other for one, other in merges)]
    tokenizer = Tokenizer(models.BPE({piece: id_ for id_, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(START, special=True)])
    parts = [*([START] if begins else []), "$A", *([END] if ends else [])]
    known = [(name, tokenizer.token_to_id(name)) for name in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=parts, special_tokens=known)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def neox(path: Path, **options: Any) -> Path:
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=options["vocab"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return save_model(path, config)


def sliding_mistral(path: Path, **options: Any) -> Path:
    from transformers import MistralConfig

    config = MistralConfig(
        vocab_size=options["vocab"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=8,
    )
    return save_model(path, config)


ZOO: dict[str, Callable[..., Path]] = {
    "llama": save_llama,
    "qwen2": save_qwen2,
    "gpt2": save_gpt2,
    "neox": neox,
    "sliding mistral": sliding_mistral,
}


@pytest.fixture(scope="module", params=list(ZOO))
def zoo_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    path = ZOO[request.param](tmp_path_factory.mktemp("zoo") / "model", vocab=VOCABULARY)
    return load_student(Student(path=str(path)), "cpu", 0)


@torch.no_grad()
def plain_greedy(model: CausalLM, ids: list[int], count: int, ends: frozenset[int]) -> list[int]:
    """The likeliest tokens one after another, everything computed again for each."""
    mode, new = model.model.training, list[int]()
    model.model.eval()
    for _ in range(count):
        logits = model.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] in ends:
            break
    model.model.train(mode)
    return new


def greedy(count: int) -> Sampling:
    return Sampling(temperature=0.0, top_p=1.0, max_new_tokens=count, seed=0)


def test_greedy_is_what_an_argmax_loop_without_a_cache_finds(zoo_model: CausalLM, tokenizer: Path) -> None:
    made = Generator(zoo_model, tokenizer, greedy(24))
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    for prompt in PROMPTS:
        (found,) = made.complete([prompt], seed=0, stops=())
        ids = reader.encode(prompt).ids
        new = plain_greedy(zoo_model, ids, 24, made.ends)
        text = reader.decode(ids + new)[len(prompt) :]
        ended = new[-1] in made.ends
        expected = text if ended else text.rstrip("\ufffd")
        assert found == Completion(expected, len(new), "end" if ended else "length", 0)


def test_a_greedy_batch_is_its_prompts_one_by_one(zoo_model: CausalLM, tokenizer: Path) -> None:
    made = Generator(zoo_model, tokenizer, greedy(24))
    together = made.complete(PROMPTS, seed=0)
    assert together == [made.complete([prompt], seed=0)[0] for prompt in PROMPTS]
    assert len({completion.text for completion in together}) == len(PROMPTS)  # they do not say the same


def scripted(path: Path, tokenizer: Path, script: str, before: int) -> CausalLM:
    """A GPT-2 that says one text, whatever it is asked: position `before - 1` is followed by the script's first token.

    Its positions alone reach the head: a token at the wrong one is seen at once.
    """
    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(script).ids
    save_gpt2(path, vocab=VOCABULARY, hidden=CONTEXT, layers=1, tie_word_embeddings=False)
    config = json.loads((path / "config.json").read_text())
    config |= {"n_positions": CONTEXT}
    (path / "config.json").write_text(json.dumps(config))
    model = load_student(Student(path=str(path), init="random"), "cpu", 0)
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            parameter.fill_(1.0 if "ln" in name and name.endswith("weight") else 0.0)
        weights = dict(model.model.named_parameters())
        weights["transformer.wpe.weight"].copy_(torch.eye(CONTEXT))
        for position, token in enumerate(ids, start=before - 1):
            weights["lm_head.weight"][token, position] = 1.0
    return model


Says = Callable[..., Generator]


@pytest.fixture
def says(tmp_path: Path, tokenizer: Path) -> Says:
    """`says(script, before=1, count=100)`: a generator that says the script after a prompt of so many tokens."""

    def make(script: str, before: int = 1, count: int = 100) -> Generator:
        return Generator(scripted(tmp_path / "model", tokenizer, script, before), tokenizer, greedy(count))

    return make


def test_a_row_ends_at_a_stop_text_and_its_text_before_it(says: Says) -> None:
    body = "\n    return 'classy' + \"\\ndef \"\n    # done"
    (found,) = says(f"{body}\nclass Other:\n    pass{END}").complete(["p"], seed=3)
    assert (found.text, found.finish, found.seed) == (body, "stop", 3)
    # A line break with four spaces is one token, and every other character; nothing after "\nclass " was asked for.
    assert found.tokens == len(body) - 2 * 4 + len("\nclass ")


@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_text_stops_at_once_even_as_the_first_word(says: Says, stop: str) -> None:
    made = says(f"{stop}tail{END}")
    (found,) = made.complete(["p"], seed=0)
    # "\nd" is one token.
    assert found == Completion("", len(stop) - stop.startswith("\nd"), "stop", 0)


def test_an_end_token_ends_a_row_and_is_no_text(says: Says) -> None:
    (found,) = says(f" x{END}y").complete(["p"], seed=0)
    assert found == Completion(" x", 3, "end", 0)


def test_any_control_token_ends_a_row(says: Says) -> None:
    (found,) = says(f" x{START}y").complete(["p"], seed=0)
    assert found == Completion(" x", 3, "end", 0)


def test_the_ends_that_the_models_own_settings_name_count_too(says: Says, tokenizer: Path) -> None:
    student = says("abc").student
    a, b = (Tokenizer.from_file(str(tokenizer / "tokenizer.json")).token_to_id(letter) for letter in "ab")
    student.model.generation_config.eos_token_id = [b]
    assert Generator(student, tokenizer, greedy(9)).complete(["p"], seed=0) == [Completion("a", 2, "end", 0)]
    student.model.config.eos_token_id = a
    assert Generator(student, tokenizer, greedy(9)).complete(["p"], seed=0) == [Completion("", 1, "end", 0)]


def test_the_limit_ends_a_row_and_cuts_no_character_in_two(says: Says) -> None:
    script = "aé日"
    found = [says(script, count=count).complete(["p"], seed=0)[0] for count in range(1, 7)]
    assert [one.text for one in found] == ["a", "a", "aé", "aé", "aé", "aé日"]
    assert [(one.tokens, one.finish) for one in found] == [(count, "length") for count in range(1, 7)]


def test_rows_of_one_batch_end_each_by_itself_at_their_own_positions(says: Says) -> None:
    # The second prompt is three tokens longer, so that its script begins three tokens later.
    made = says(f"abc x\ndef g{END}", count=5)
    found = made.complete(["p", "pqrs", "p" * 9], seed=0)
    assert [(one.text, one.finish) for one in found] == [("abc x", "length"), (" x\ndef", "length"), (" g", "end")]
    assert [one.tokens for one in found] == [5, 5, 3]
    made.sampling = greedy(20)
    found = made.complete(["p", "pqrs", "p" * 9], seed=0)
    assert [(one.text, one.finish, one.tokens) for one in found] == [
        ("abc x", "stop", 9),
        (" x", "stop", 6),
        (" g", "end", 3),
    ]


def test_a_prompt_is_asked_without_its_white_end_which_its_answer_begins_with(says: Says) -> None:
    made = says(f"\n    return 1\ndef g{END}")
    asked = ["p", "p\n", "p\n    ", "p \t"]
    found = [made.complete([prompt], seed=0)[0].text for prompt in asked]
    assert found == ["\n    return 1", "    return 1", "return 1", "\n    return 1"]
    assert made.room("p") == made.room("p   \n")


def test_what_the_tokenizer_puts_around_a_text_begins_a_prompt_and_never_ends_it(says: Says, tmp_path: Path) -> None:
    student = says(f"xyz{END}").student
    framed = Generator(student, byte_tokenizer(tmp_path / "framed", begins=True, ends=True), greedy(50))
    assert framed.room("p" * 100) == CONTEXT - 101
    assert framed.complete(["p"], seed=0)[0].text == "yz"  # one position further, for the beginning token


def test_a_tokenizer_that_joins_words_with_a_mark_keeps_the_space_before_the_first_one(
    says: Says, tmp_path: Path
) -> None:
    student = says("").student
    words = Tokenizer(models.WordLevel({"<unk>": 0, "▁p": 1, "▁return": 2, "▁x": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    words.save(str(tmp_path / "tokenizer.json"))
    with torch.no_grad():
        head = dict(student.model.named_parameters())["lm_head.weight"]
        head[2, 0] = head[3, 1] = head[0, 2] = 1.0
    assert words.decode([2, 3]) == "return x"
    assert Generator(student, tmp_path, greedy(2)).complete(["p"], seed=0)[0].text == " return x"


def test_a_context_that_ends_before_the_limit_ends_a_row_and_leaves_the_others_alone(says: Says) -> None:
    made = says("abcdefgh" * 16, count=100)
    prompts = ["p", "p" * 120, "p" * CONTEXT, "p" * 500, "q" * 120]
    assert [made.room(prompt) for prompt in prompts] == [100, 8, 0, 0, 8]
    found = made.complete(prompts, seed=0)
    assert [one.tokens for one in found] == [100, 8, 0, 0, 8]
    assert {one.finish for one in found} == {"length"}
    assert found[2].text == found[3].text == ""
    assert found == [made.complete([prompt], seed=0)[0] for prompt in prompts]


def test_a_model_without_a_named_context_has_room_for_all(says: Says) -> None:
    made = says("x")
    made.context = None
    assert made.room("p" * 500) == 100


def test_each_token_after_the_first_computes_one_position_more_and_none_again(says: Says) -> None:
    made, widths = says("x" * 20, count=5), list[int]()
    made.student.model.register_forward_pre_hook(
        lambda module, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    made.complete(["p" * 7, "p"], seed=0)
    assert widths == [7, 1, 1, 1, 1]


class Counted:
    """The tokenizer itself, which notes how many tokens it was given to read at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.tails, self.whole = tokenizer, [0], 0

    def decode_batch(self, rows: Sequence[list[int]]) -> list[str]:
        self.tails += [len(row) for row in rows]
        return list(self.tokenizer.decode_batch(rows))

    def decode(self, ids: list[int]) -> str:
        self.whole += 1
        return str(self.tokenizer.decode(ids))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


def test_looking_for_a_stop_costs_the_same_however_long_the_text_is(says: Says) -> None:
    made = says("x" * 119 + "\nclass y")
    made.sampling = greedy(120)
    counted = Counted(made._tokenizer)
    made._tokenizer = counted  # type: ignore[assignment]
    assert made.complete(["p"], seed=0)[0].tokens == 120
    assert max(counted.tails) <= max(len(stop) for stop in STOPS) + 1
    assert counted.whole <= 4


def test_poll_is_called_at_every_token_and_ends_all_by_raising(says: Says) -> None:
    made, calls = says("x" * 100, count=50), 0

    def poll() -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise InterruptedError

    made.student.model.train()
    with pytest.raises(InterruptedError):
        made.complete(["p"], seed=0, poll=poll)
    assert calls == 7
    assert made.student.model.training
    made.complete(["p"], seed=0, poll=poll)
    assert calls == 57


def test_how_many_rows_have_ended_is_told_while_a_batch_is_made(says: Says) -> None:
    made, told = says(f"{'x' * 10}{END}", count=50), list[int]()
    made.complete(["p", "p" * 5, "p" * 9, "p" * 200], seed=0, poll=lambda: told.append(made.ended))
    assert told == [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_logits_that_are_not_numbers_are_an_error_and_no_answer(says: Says) -> None:
    made = says("x")
    with torch.no_grad():
        dict(made.student.model.named_parameters())["lm_head.weight"].fill_(torch.nan)
    with pytest.raises(ModelError, match="its logits are not numbers"):
        made.complete(["p"], seed=0)


def test_what_cannot_be_asked_is_refused(says: Says, tmp_path: Path) -> None:
    made = says("x")
    with pytest.raises(DataError, match="no token"):
        made.complete([""], seed=0)
    with pytest.raises(KdError, match=r"no tokenizer\.json"):
        Generator(made.student, tmp_path, greedy(1))
    small = load_student(Student(path=str(save_qwen2(tmp_path / "small", vocab=64))), "cpu", 0)
    directory = byte_tokenizer(tmp_path / "large")
    with pytest.raises(DataError, match=r"has ids up to 261; expected ids below the 64 rows"):
        Generator(small, directory, greedy(1))


# Sampling


@pytest.fixture(scope="module")
def dice(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> CausalLM:
    """A model whose next token has logits 2, 1 and 0 for a, b and c, and about -9 for every other one."""
    model = scripted(tmp_path_factory.mktemp("dice") / "model", tokenizer, "", 1)
    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    weights = dict(model.model.named_parameters())
    with torch.no_grad():
        # The last layer norm gives one known vector everywhere.
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"][0] = 1.0
        # No two alike: of equal ones a limit of 50 takes all.
        weights["lm_head.weight"][:, 0] = torch.linspace(-9.0, -9.1, VOCABULARY)
        for letter, logit in zip("abc", (2.0, 1.0, 0.0), strict=True):
            weights["lm_head.weight"][reader.token_to_id(letter), 0] = logit
    return model


def rolled(dice: CausalLM, tokenizer: Path, temperature: float, top_p: float, seed: int = 0) -> str:
    made = Generator(dice, tokenizer, Sampling(temperature, top_p, 60, 0))
    return "".join(one.text for one in made.complete(["p"] * 60, seed, stops=()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_the_probabilities_of_their_temperature(
    dice: CausalLM, tokenizer: Path, temperature: float
) -> None:
    text = rolled(dice, tokenizer, temperature, 1.0)
    logits = torch.tensor([2.0, 1.0, 0.0, *[-9.0] * (VOCABULARY - 3)]) / temperature
    expected = logits.double().softmax(0)[:3]
    shares = torch.tensor([text.count(letter) / len(text) for letter in "abc"], dtype=torch.float64)
    spread = (expected * (1 - expected) / len(text)).sqrt()
    if temperature < 2:  # at 2 the other tokens end rows and are several characters, or none
        assert len(text) > 3000
        assert ((shares - expected).abs() < 5 * spread + 0.005).all()
    assert shares[0] > shares[1] > shares[2] > 0


def test_top_p_takes_the_likeliest_tokens_that_hold_so_much(dice: CausalLM, tokenizer: Path) -> None:
    # 0.66, 0.24 and 0.09: the first alone holds 0.6, the first two 0.8.
    assert set(rolled(dice, tokenizer, 1.0, 0.6)) == {"a"}
    assert set(rolled(dice, tokenizer, 1.0, 0.8)) == {"a", "b"}


def test_more_than_the_fifty_likeliest_tokens_can_be_drawn(dice: CausalLM, tokenizer: Path) -> None:
    assert len(set(rolled(dice, tokenizer, 10.0, 1.0))) > 80


def test_a_seed_decides_what_is_drawn_and_nothing_else_does(dice: CausalLM, tokenizer: Path) -> None:
    torch.manual_seed(1)
    first = rolled(dice, tokenizer, 1.0, 1.0, seed=5)
    after = torch.rand(3)
    torch.manual_seed(2)
    assert rolled(dice, tokenizer, 1.0, 1.0, seed=5) == first
    assert rolled(dice, tokenizer, 1.0, 1.0, seed=6) != first
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)  # the global state is left as it was


def test_greedy_does_not_depend_on_a_seed(dice: CausalLM, tokenizer: Path) -> None:
    made = Generator(dice, tokenizer, greedy(9))
    texts = [[one.text for one in made.complete(["p", "pq"], seed)] for seed in (1, 2)]
    assert texts == [["a" * 9] * 2] * 2


def test_the_models_own_generation_settings_change_nothing_and_stay(dice: CausalLM, tokenizer: Path) -> None:
    own = dice.model.generation_config
    own.repetition_penalty, own.no_repeat_ngram_size, own.min_new_tokens = 5.0, 1, 3
    try:
        found = Generator(dice, tokenizer, greedy(9)).complete(["p"], seed=0)
        assert found[0].text == "a" * 9
        assert dice.model.generation_config is own
    finally:
        own.repetition_penalty = own.no_repeat_ngram_size = own.min_new_tokens = None


def test_bfloat16_by_autocast_says_the_same_twice(tokenizer: Path, tmp_path: Path) -> None:
    path = save_llama(tmp_path / "llama", vocab=VOCABULARY)
    model = load_student(Student(path=str(path)), "cpu", 0)
    made = Generator(model, tokenizer, greedy(16), autocast=torch.bfloat16)
    seen = set()
    handle = model.model.get_output_embeddings().register_forward_hook(lambda *call: seen.add(call[-1].dtype))
    first = made.complete(PROMPTS, seed=0)
    handle.remove()
    assert seen == {torch.bfloat16}
    assert made.complete(PROMPTS, seed=0) == first


def test_every_batch_of_an_evaluation_has_a_seed_of_its_own() -> None:
    seeds = [batch_seed(seed, batch) for seed in (0, 1, 11) for batch in (0, 1, 11)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**48 for seed in seeds)
    assert batch_seed(0, 0) == 161_847_352_854_460  # what a resumed evaluation has to find again
