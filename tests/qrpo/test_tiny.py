import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from qrpo.tiny import build_tiny_model, build_tiny_reward_model

TEXTS = ["sort these numbers: 3 1 2", "1 2 3", "a longer text, with some words in it"] * 4
CHAT = [{"role": "user", "content": "sort 3 1 2"}]


def test_tiny_model_loads_as_an_ordinary_model_folder(tmp_path):
    folder = build_tiny_model(tmp_path / "model", TEXTS)

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_tiny_tokenizer_keeps_every_string_and_begins_once(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_model(tmp_path, TEXTS))
    text = "Grüße,  日本\n\t 12"

    ids = tokenizer(text)["input_ids"]

    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_chat_template_renders_prompt_then_completion(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(build_tiny_model(tmp_path, TEXTS))

    def render(messages, **kwargs):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)

    prompt = render(CHAT, add_generation_prompt=True)
    whole = render([*CHAT, {"role": "assistant", "content": "1 2 3"}])

    completion = [*tokenizer("1 2 3", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert prompt + completion == whole


def test_tiny_weights_are_a_function_of_the_seed_and_leave_the_callers_random_state_alone(tmp_path):
    state = torch.random.get_rng_state()

    folders = [build_tiny_model(tmp_path / str(i), TEXTS, seed=seed) for i, seed in enumerate([0, 0, 1])]

    same, again, other = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert same == again != other
    assert torch.equal(state, torch.random.get_rng_state())


def test_tiny_reward_model_scores_with_one_logit(tmp_path):
    folder = build_tiny_reward_model(tmp_path, TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    batch = tokenizer(["1 2", "a text"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    assert logits.shape == (2, 1)
    assert logits[0] != logits[1]
