"""Writes the trained model as a Hugging Face checkpoint and checks that transformers agrees with it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from data import SPECIALS
from dialogues import Turn, render
from model import Config, TinyMoe
from safetensors.torch import save_file
from tokenizers import Tokenizer

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# What config.json says besides the sizes.
FIXED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rope_scaling": None,
    "router_aux_loss_coef": 0.01,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
}
# A conversation ends with <|im_end|>, a story with <|endoftext|>.
GENERATION = {
    "bos_token_id": 0,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
    "do_sample": False,
    "max_new_tokens": 256,
}
ADDED_TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def hf_config(cfg: Config) -> dict[str, object]:
    """config.json as published Qwen3-MoE checkpoints write it."""
    fields: dict[str, object] = {**cfg.as_dict(), **FIXED, "intermediate_size": 4 * cfg.hidden_size}
    return dict(sorted(fields.items()))


def tensors(model: TinyMoe) -> dict[str, torch.Tensor]:
    """The weights in bf16 under their published names: one tensor per expert and projection."""
    result: dict[str, torch.Tensor] = {}
    for name, param in model.state_dict().items():
        head, _, last = name.rpartition(".")
        if last == "gate_up":
            for expert, (gate, up) in enumerate(half.chunk(2) for half in param):
                result[f"model.{head}.experts.{expert}.gate_proj.weight"] = gate
                result[f"model.{head}.experts.{expert}.up_proj.weight"] = up
        elif last == "down":
            for expert, down in enumerate(param):
                result[f"model.{head}.experts.{expert}.down_proj.weight"] = down
        else:
            result[f"model.{name}"] = param
    return {name: value.to(torch.bfloat16).contiguous() for name, value in result.items()}


def tokenizer_config(cfg: Config) -> dict[str, object]:
    """tokenizer_config.json: the generic fast class, which needs nothing but the tokenizers library."""
    decoder = {str(i): {"content": token, **ADDED_TOKEN} for i, token in enumerate(SPECIALS)}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.max_position_embeddings,
    }


def export(model: TinyMoe, tokenizer: Tokenizer, out: Path) -> None:
    """Writes every file beside its target and renames it, so that a reader never sees half a file."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": json.dumps(hf_config(model.cfg), indent=2) + "\n",
        "generation_config.json": json.dumps(GENERATION, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(tokenizer_config(model.cfg), indent=2) + "\n",
        "tokenizer.json": tokenizer.to_str(pretty=False) + "\n",
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".tiny_moe_") as scratch:
        staged = Path(scratch)
        for name, text in files.items():
            (staged / name).write_text(text, encoding="utf-8")
        save_file(tensors(model), staged / "model.safetensors", metadata={"format": "pt"})
        for name in [*files, "model.safetensors"]:
            (staged / name).chmod(0o644)
            os.replace(staged / name, out / name)


def rounded(model: TinyMoe) -> TinyMoe:
    """The model with bf16-rounded weights, which is what the file holds."""
    copy = TinyMoe(model.cfg)
    copy.load_state_dict({name: value.to(torch.bfloat16).float() for name, value in model.state_dict().items()})
    return copy.eval()


def check(model: TinyMoe, out: Path) -> float:
    """Largest difference of the logits between this code and transformers, both in fp32."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.randint(3, model.cfg.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    ours = rounded(model)
    with torch.no_grad():
        difference = (ours.logits(ours(ids)[0]) - reference(ids).logits).abs().max().item()
    if difference > 1e-3:
        raise RuntimeError(f"the exported model differs from transformers by {difference}")
    return difference


def check_text(out: Path) -> None:
    """The Jinja template must equal the one trained with, and any text must survive a round trip."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text != render([Turn("Hi", "")], "Be brief.", generate=True):
        raise RuntimeError(f"the chat template gives {text!r}")
    sample = "Grüße, 世界! 🦊\n\tx  =  12.5 <|im_end|>"
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise RuntimeError("text does not survive the tokenizer")
