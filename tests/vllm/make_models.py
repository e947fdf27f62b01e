"""Makes tiny language models with random weights, for the tests with a real vLLM; run with that vLLM's own Python.

    make_models.py DIRECTORY NAME...

DIRECTORY/NAME becomes a Llama with two layers, a byte-level tokenizer and a chat template: less than 1 MB, nothing is
downloaded. Each name gets weights of its own, always the same ones, so that answers at temperature 0 tell one model from the
other, and weights from garbage.
"""

import sys
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ("<s>", "</s>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{ '<s>' }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_CONTEXT_TOKENS = 512
# Wider than the usual 0.02: logits far apart, so that the same weights give the same answer, whatever the batch.
_WEIGHT_RANGE = 0.3


def _tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and whatever merges one sentence gives."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and the dog sleeps"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=_CONTEXT_TOKENS,
    )


def make(directory: Path) -> None:
    """One model."""
    tokenizer = _tokenizer()
    torch.manual_seed(zlib.crc32(directory.name.encode()))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT_TOKENS,
        initializer_range=_WEIGHT_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)  # the weights come as 0600, and the engine is another user


if __name__ == "__main__":
    for name in sys.argv[2:]:
        make(Path(sys.argv[1]) / name)
