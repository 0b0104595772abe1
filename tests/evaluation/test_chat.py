"""Chats: prompts are the beginnings of training examples; a conversation with a cache equals one without."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from trinity.config.model import ModelConfig
from trinity.data.tokenizer.tokenizer import save_tokenizer, train_tokenizer
from trinity.errors import UserError
from trinity.evaluation.chat import AnswerSettings, ChatTemplate, Conversation, end_of_turn_ids
from trinity.evaluation.generate import generate_batch
from trinity.evaluation.sampling import Sampling
from trinity.models import Trinity

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# the first user message is left out once there is an answer: what was read is no beginning of the next turn
FORGETFUL = TEMPLATE.replace("{{ m['role'] }}", "{% if messages|length > 2 and loop.first %}{% continue %}{% endif %}x")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["user: the rain in Spain\nassistant: stays in the plain\n"] * 3, 285), folder)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A tokenizer with a chat template."""
    shutil.copytree(base, tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text(TEMPLATE)
    return tmp_path / "chat"


@pytest.fixture
def model() -> Trinity:
    """In float64; window 6, shorter than a turn; logits of 3, so that the answer depends on the turn."""
    config = ModelConfig(
        vocab_size=290, width=24, layers=4, dense_layers=1, dense_width=40, heads=4, kv_heads=2, head_dim=8, window=6,
        experts=6, active_experts=2, expert_width=10,
    )  # fmt: skip
    model = Trinity(config).double()
    model.init_weights(2)
    with torch.no_grad():
        model.head.weight.mul_(6)
    return model


def texts_of(model: Trinity, folder: Path, turns: list[str], settings: AnswerSettings, system: str = "") -> list[str]:
    conversation = Conversation(model, ChatTemplate(folder), settings, system)
    return ["".join(piece.text for piece in conversation.answer(turn)) for turn in turns]


@pytest.mark.parametrize("template", [TEMPLATE, FORGETFUL], ids=["only adds", "changes the beginning"])
def test_a_conversation_equals_its_turns_read_anew(model: Trinity, folder: Path, template: str) -> None:
    """Three turns; each answer from the whole conversation, rendered by transformers, without an earlier cache.

    A reply begins a part of its own in the encoded text, so a reply of this tokenizer, which begins with no white space
    that would join the prompt's, has the tokens of transformers.
    """
    (folder / "chat_template.jinja").write_text(template)
    settings = AnswerSettings(9, Sampling(temperature=0.8), seed=4, stop_ids=(0, 1), chunk=7)
    turns = ["the rain", "Spain", "in the plain"]
    answers = texts_of(model, folder, turns, settings, system="stay")
    hf, messages = AutoTokenizer.from_pretrained(folder), [{"role": "system", "content": "stay"}]
    for turn, answer in zip(turns, answers):
        messages.append({"role": "user", "content": turn})
        prompt = hf.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        [tokens] = generate_batch(model, [prompt], 9, settings.sampling, [4], (0, 1))
        assert hf.decode(tokens, skip_special_tokens=True).rstrip("\ufffd") == answer
        messages.append({"role": "assistant", "content": answer})
    assert len(set(answers)) == 3


def test_earlier_turns_are_not_read_again(model: Trinity, folder: Path) -> None:
    """The second turn only adds to what the cache has; as if the first answer had been "stays"."""
    settings = AnswerSettings(3, Sampling(temperature=0), stop=["x"])
    conversation = Conversation(model, ChatTemplate(folder), settings)
    with torch.no_grad():
        model.head.weight[:] = 0  # greedy: always id 0, BOS, which is skipped in texts
    read = []
    model.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    list(conversation.answer("the rain"))
    first = len(ChatTemplate(folder).token_ids(conversation.messages[:1]))
    assert read == [first, 1, 1]
    conversation.messages[1]["content"] = "stays"
    conversation._tokens = ChatTemplate(folder).token_ids(conversation.messages[:3])[: first + 2]
    list(conversation.answer("Spain"))
    whole = len(ChatTemplate(folder).token_ids(conversation.messages[:3]))
    assert read[3:] == [whole - first - 2, 1, 1]


def test_stop_strings_end_an_answer(model: Trinity, folder: Path) -> None:
    settings = AnswerSettings(30, Sampling(temperature=0))
    [whole] = texts_of(model, folder, ["the rain"], settings)
    stop = whole[4:6]
    [cut] = texts_of(model, folder, ["the rain"], AnswerSettings(30, Sampling(temperature=0), stop=[stop]))
    assert cut == whole[: whole.index(stop)]


def test_end_of_turn_ids(folder: Path) -> None:
    """BOS 0 and EOS 1 of the tokenizer, and those of generation_config.json, a number or a list."""
    assert end_of_turn_ids(folder, 290) == [0, 1]
    for value, expected in ((7, [0, 1, 7]), ([9, 7, 1], [0, 1, 7, 9]), (None, [0, 1])):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert end_of_turn_ids(folder, 290) == expected
    (folder / "generation_config.json").write_text('{"eos_token_id": [290]}')
    with pytest.raises(UserError, match=r"eos_token_id=\[290\] is no token of the model"):
        end_of_turn_ids(folder, 290)


def test_refusals(base: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no chat template; fine-tune the model to chat"):
        ChatTemplate(base)
    for template, content, words in (
        (
            "{{ raise_exception('roles must alternate') }}",
            "x",
            r"refuses the messages \(roles must.*leave --system out",
        ),
        (
            "{{ user_name.first }}",
            "x",
            r"chat_template\.jinja fails on the messages \('user_name' is undef.*correct it",
        ),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
            "x",
            r"fails on the messages \(it calls itself without end",
        ),
        (TEMPLATE, "\ufdd0", "the conversation holds one of U[+]FDD0"),
    ):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=words) as error:
            ChatTemplate(folder).token_ids([{"role": "user", "content": content}])
        assert "\n" not in str(error.value)
