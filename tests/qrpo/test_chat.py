"""Chat templates: what is encoded is what the template renders, token for token, and what an engine would sample."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from qrpo.data.chat import encode_completion, encode_conversation, encode_prompt, load_tokenizer
from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig

HELLO = [{"role": "user", "content": "Say hello"}]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMING = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
UNLIKE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'now speak: ' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def test_a_prompt_is_what_the_template_renders(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, HELLO)
    assert ids == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [None, CHATML, TRIMMING], ids=["own", "chatml", "trimming"])
@pytest.mark.parametrize(
    "text", ["Hello!", "two\nlines", "", "naïve 日本 🙂", "a  b", "<|user|", "assistant"]
)
def test_prompt_and_completion_are_the_beginning_of_the_conversation(
    tokenizer: Any, template: str | None, text: str
) -> None:
    if template:
        tokenizer.chat_template = template
    both = encode_prompt(tokenizer, HELLO) + encode_completion(tokenizer, HELLO, text)
    conversation = [*HELLO, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    decoded = tokenizer.decode(both)
    assert rendered.startswith(decoded)
    assert rendered[len(decoded) :].strip() == ""  # at most a line break behind the end token
    assert decoded.endswith(tokenizer.eos_token if template is None else "<|im_end|>")


def test_a_completion_ends_with_one_end_token(tokenizer: Any) -> None:
    ids = encode_completion(tokenizer, HELLO, "Hello there")
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids[:-1]) == "Hello there"


def test_a_template_without_an_end_gets_the_end_of_sequence_token(tokenizer: Any) -> None:
    tokenizer.chat_template = ENDLESS
    ids = encode_completion(tokenizer, HELLO, "Hello")
    assert tokenizer.decode(ids) == "Hello" + tokenizer.eos_token


def test_no_second_beginning_token(tokenizer: Any) -> None:
    tokenizer.chat_template = TRIMMING
    assert tokenizer("plain text").input_ids[0] == tokenizer.bos_token_id  # it adds one by itself
    ids = encode_prompt(tokenizer, HELLO) + encode_completion(tokenizer, HELLO, "Hello")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_conversation(tokenizer, HELLO).count(tokenizer.bos_token_id) == 1


def test_surrounding_blanks_are_kept_unless_the_template_trims(tokenizer: Any) -> None:
    assert tokenizer.decode(encode_completion(tokenizer, HELLO, " hi ")[:-1]) == " hi "
    tokenizer.chat_template = TRIMMING
    assert tokenizer.decode(encode_completion(tokenizer, HELLO, " hi ")[:-1]) == "hi"


def test_an_end_token_inside_the_text_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="contains the end token"):
        encode_completion(tokenizer, HELLO, f"done{tokenizer.eos_token}more")


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = UNLIKE
    with pytest.raises(DataError, match="renders the prompt differently"):
        encode_completion(tokenizer, HELLO, "Hello")


def test_messages_that_the_template_refuses_are_a_data_error(tokenizer: Any) -> None:
    tokenizer.chat_template = STRICT
    with pytest.raises(DataError, match=r"roles: system user.*no system role"):
        encode_prompt(tokenizer, [{"role": "system", "content": "Be brief"}, *HELLO])


def test_a_folder_without_tokenizer_says_so(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("token*", "chat_template*"))
    with pytest.raises(ModelError, match=r"tokenizer.*save_pretrained"):
        load_tokenizer(ModelConfig(path=str(folder)))


def test_a_tokenizer_without_chat_template_says_so(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("chat_template*"))
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        load_tokenizer(str(folder))
    assert load_tokenizer(str(folder), chat_template=False)


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_tokenizer(str(tmp_path / "empty"))
