"""A tiny random Llama with a real tokenizer: needs no download, runs anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

CHAT_TEMPLATE = """\
{% for message in messages %}{{ message.role }}: {{ message.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def make_tiny_model(
    folder: Path,
    texts: Iterable[str],
    vocab_size: int,
    context_length: int,
    hidden_size: int = 64,
    head_dim: int = 16,
) -> Path:
    """Write a float32 model of two layers, the same every time, and a tokenizer trained on `texts`
    into `folder`, and return that."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    train_tokenizer(folder, texts, vocab_size)
    torch.manual_seed(0)
    num_heads = hidden_size // head_dim
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads // 2,
        head_dim=head_dim,
        max_position_embeddings=context_length,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():  # spread the logits, so that greedy choices are far from ties
        model.lm_head.weight.mul_(20.0)
    model.save_pretrained(folder)
    return folder


def train_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer with a chat template into `folder`; token 0 begins, token 1
    ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
