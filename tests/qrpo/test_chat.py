"""Chat templates: what is encoded is what the template renders, token for token, and what an engine would sample."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qrpo.data.chat import (
    encode_completion,
    encode_conversation,
    encode_conversations,
    encode_prompt,
    encode_text,
    foreign_tokens,
    load_tokenizer,
)
from qrpo.errors import DataError, ModelError
from qrpo.models import ModelConfig
from tests.support.refusals import refuses

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
def tokenizer(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


@pytest.mark.parametrize("template", [None, CHATML, TRIMMING], ids=["own", "chatml", "trimming"])
@pytest.mark.parametrize(
    "text", ["Hello!", "two\nlines", "", "naïve 日本 🙂", "a  b", "<|user|", "assistant"]
)
def test_prompt_and_completion_are_the_beginning_of_the_conversation(tokenizer, template, text: str):
    if template:
        tokenizer.chat_template = template
    both = encode_prompt(tokenizer, HELLO) + encode_completion(tokenizer, HELLO, text)
    conversation = [*HELLO, {"role": "assistant", "content": text}]
    rendered = tokenizer.apply_chat_template(conversation, tokenize=False)
    decoded = tokenizer.decode(both)
    assert rendered.startswith(decoded)
    assert rendered[len(decoded) :].strip() == ""  # at most a line break behind the end token
    assert decoded.endswith(tokenizer.eos_token if template is None else "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "text", "tokens"),
    [
        (None, "Hello there", "Hello there<|end|>"),
        (None, " hi ", " hi <|end|>"),
        (TRIMMING, " hi ", "hi<|im_end|>"),
        (ENDLESS, "Hello", "Hello<|end|>"),  # a template without an end gets the end-of-sequence token
    ],
)
def test_a_completion_ends_with_one_end_token(tokenizer, template, text, tokens):
    tokenizer.chat_template = template or tokenizer.chat_template
    ids = encode_completion(tokenizer, HELLO, text)
    assert tokenizer.decode(ids) == tokens
    assert ids.count(ids[-1]) == 1


def test_no_second_beginning_token(tokenizer):
    ids = encode_prompt(tokenizer, HELLO)
    assert ids == tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = TRIMMING
    assert tokenizer("plain text").input_ids[0] == tokenizer.bos_token_id  # it adds one by itself
    ids = encode_prompt(tokenizer, HELLO) + encode_completion(tokenizer, HELLO, "Hello")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert encode_conversation(tokenizer, HELLO).count(tokenizer.bos_token_id) == 1


def test_what_cannot_be_encoded_is_a_data_error(tokenizer):
    inside = f"done{tokenizer.eos_token}more"
    refuses(DataError, "contains the end token", encode_completion, tokenizer, HELLO, inside)
    tokenizer.chat_template = UNLIKE
    refuses(DataError, "renders the prompt differently", encode_completion, tokenizer, HELLO, "Hello")
    tokenizer.chat_template = STRICT
    messages = [{"role": "system", "content": "Be brief"}, *HELLO]
    refuses(DataError, r"roles: system user.*no system role", encode_prompt, tokenizer, messages)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (["token*", "chat_template*"], r"tokenizer.*save_pretrained"),
        (["chat_template*"], r"no chat template.*chat_template\.jinja"),
        (["*"], r"no config\.json"),
    ],
)
def test_a_folder_without_what_is_needed_says_so(tiny_model, tmp_path, missing, message):
    folder = str(shutil.copytree(tiny_model, tmp_path / "a", ignore=shutil.ignore_patterns(*missing)))
    refuses(ModelError, message, load_tokenizer, folder)
    refuses(ModelError, "no model folder", load_tokenizer, str(tmp_path / "nowhere"))
    if missing == ["chat_template*"]:
        assert load_tokenizer(ModelConfig(path=folder), chat_template=False)


# ------------------------------------------------------------------------------------- SentencePiece

LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA_2.replace("' ' + m['content'] | trim + ' '", "m['content']")
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
OPEN = ZEPHYR.replace("{{ '<|assistant|>\n' }}", "{{ '<|assistant|>' }}")
SPACED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module", params=["legacy", "first", "always", "never"])
def sentencepiece(request):
    """A tokenizer as Llama 2, Mistral, Zephyr and Gemma have: spaces belong to words, other bytes have tokens."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    initial = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=initial, show_progress=False)
    texts = ["Say hello there [INST] [/INST] Hello to you <|user|> <|assistant|> user: assistant: it is"] * 9
    backend.train_from_iterator(texts, trainer)
    saved = json.loads(backend.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if token["content"] in special]
    backend = Tokenizer.from_str(json.dumps(saved))
    if request.param == "legacy":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("template", [LLAMA_2, MISTRAL, ZEPHYR, OPEN, SPACED])
@pytest.mark.parametrize("text", ["Hello to you", "naïve 日本", "it", "two\nlines", ""])
def test_sentencepiece_completions_are_the_end_of_the_encoded_conversation(
    sentencepiece, template, text: str
):
    sentencepiece.chat_template = template
    messages = [*HELLO, {"role": "assistant", "content": text}]
    prompt, completion = encode_prompt(sentencepiece, HELLO), encode_completion(sentencepiece, HELLO, text)
    whole = sentencepiece.apply_chat_template(messages, return_dict=False)
    whole = whole[: whole.index(sentencepiece.eos_token_id, len(prompt)) + 1 if template != SPACED else None]
    if (
        template == SPACED
    ):  # the space at the prompt's end is a token there, and part of a word in the conversation
        assert sentencepiece.decode(prompt + completion) == sentencepiece.decode(whole)
    else:
        assert prompt + completion == whole
    assert completion.count(sentencepiece.eos_token_id) == 1
    assert foreign_tokens(sentencepiece, prompt) is None


# ------------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("ends", [False, True], ids=["bos", "bos and eos"])
def test_a_plain_completion_has_one_end_token(tokenizer, ends):
    begin, end = tokenizer.bos_token, tokenizer.eos_token
    if ends:
        tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            special_tokens=[(begin, tokenizer.bos_token_id), (end, tokenizer.eos_token_id)],
        )
    for text in (" hello world", f" hello world{end}"):
        prompt, completion = encode_text(tokenizer, "Say", text)
        assert tokenizer.decode(prompt + completion) == f"{begin}Say hello world{end}"
    refuses(DataError, "contains the end token", encode_text, tokenizer, "Say", f" hello{end} world")


# ------------------------------------------------------------------------------------- dates and tools

DATED = "{{ 'Today is ' + strftime_now('%d %b %Y %f') + '. ' }}" + CHATML
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}],
}
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + m['content'] }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


def test_a_template_that_writes_the_time_gives_rewards_the_same_tokens_at_any_time(tokenizer):
    tokenizer.chat_template = DATED
    assert encode_prompt(tokenizer, HELLO) != encode_prompt(tokenizer, HELLO)
    assert tokenizer.decode(encode_completion(tokenizer, HELLO, "Hello")) == "Hello<|im_end|>"
    [first], [second] = encode_conversations(tokenizer, [HELLO]), encode_conversations(tokenizer, [HELLO])
    assert first == second == encode_conversation(tokenizer, HELLO)
    assert tokenizer.decode(first).startswith("Today is 26 Jul 2024")


def test_tools_and_tool_calls_reach_the_tokens_or_the_row_is_refused(tokenizer):
    called = [*HELLO, CALL, {"role": "tool", "content": "2"}]
    tokenizer.chat_template = WITH_TOOLS
    both = encode_prompt(tokenizer, called, TOOLS) + encode_completion(tokenizer, called, "2", TOOLS)
    text = tokenizer.decode(both)
    assert json.dumps(TOOLS) in text
    assert json.dumps(CALL["tool_calls"]) in text
    assert text.endswith("<|im_end|><|im_start|>tool2<|im_end|><|im_start|>assistant2<|im_end|>")
    tokenizer.chat_template = CHATML
    refuses(DataError, "ignores the tools", encode_prompt, tokenizer, HELLO, TOOLS)
    refuses(DataError, "ignores tool calls", encode_prompt, tokenizer, called)


def test_named_templates_without_a_default_are_refused_by_name(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = {"rag": CHATML, "tool_use": WITH_TOOLS}
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    refuses(ModelError, r"names rag, tool_use, and none named `default`: save", load_tokenizer, str(folder))
