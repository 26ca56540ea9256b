"""Small random models: a Llama, a reward model, and a tokenizer. Nothing is downloaded.

The demo starts from such a model, and the tests run real engines and real training on them. They
are ordinary Hugging Face folders (safetensors, fast tokenizer with chat template, generation
config): what works on them works on a large model. The weights are random, drawn from the seed.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Rendering a conversation equals rendering its prompt, then the completion's text, then the end
# token.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def build_tiny_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 512, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with chat template, begin, end and padding
    tokens.

    Like Llama's it puts the begin token before plain text, and every string survives encoding and
    decoding. Its vocabulary holds at most `vocab_size` tokens, and at least the 256 bytes and the
    special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A {BEGIN} $B",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=max_length,
        padding_side="right",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_tiny_model(
    folder: str | Path,
    texts: Sequence[str],
    *,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 512,
    max_length: int = 512,
    tied: bool = False,
    seed: int = 0,
    reward: bool = False,
) -> Path:
    """Write a Llama with random float32 weights and a tokenizer trained on `texts` to `folder`, and
    return the folder.

    `max_length` is the context in tokens; `tied` shares the embedding with the head; with `reward`
    it is a sequence classifier with one logit. The same arguments give the same weights; the
    caller's random state is not changed.
    """
    tokenizer = build_tiny_tokenizer(texts, vocab_size=vocab_size, max_length=max_length)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        **ids,
        dtype="float32",
        num_labels=1 if reward else 2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(config) if reward else LlamaForCausalLM(config)
        if reward:  # the usual 0.02 would squeeze all rewards together; spread logits show ordering mistakes
            torch.nn.init.normal_(model.score.weight, std=1.0)
    if not reward:
        model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def build_tiny_reward_model(folder: str | Path, texts: Sequence[str], **options: Any) -> Path:
    """`build_tiny_model` for a reward model."""
    return build_tiny_model(folder, texts, reward=True, **options)
