#!/usr/bin/env python3
"""Makes tiny random models of every family, as Hugging Face folders and GGUF files, with golden logits.

    pip install torch transformers gguf accelerate
    python tests/reference/make_golden_families.py

Each folder of `tiny/` then holds a checkpoint, `golden.json` with the answers of transformers in float32, and for most
families `model.gguf` with the same numbers under llama.cpp's names and in llama.cpp's order of rows.
"""
import json
import math
import pathlib
import shutil

import gguf
import numpy as np
import torch
from transformers import (AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config,
                          Qwen3MoeConfig)

from golden import golden_of, write

HERE = pathlib.Path(__file__).parent
VOCAB_SIZE = 256
NUM_GREEDY = 16
# The windows are 16 and 24 long; the last prompt is long enough for many tiles and pages of attention.
# Below it, sums in another order might choose another token.
MIN_GAP = 0.01
PROMPT_LENS = [3, 40, 90, 1100]

SHARED = dict(vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
              num_hidden_layers=2, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
              pad_token_id=0)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=128)

# Family: its config, the dtype of its folder, the name of its GGUF.
FAMILIES = {
    "llama3": (LlamaConfig(**SHARED, rope_parameters=LLAMA3_ROPE), torch.float32, "llama"),
    "mistral": (MistralConfig(**SHARED, sliding_window=24), torch.bfloat16, None),
    "qwen2": (Qwen2Config(**SHARED | dict(tie_word_embeddings=True)), torch.bfloat16, "qwen2"),
    "qwen3": (Qwen3Config(**SHARED, head_dim=32), torch.bfloat16, "qwen3"),
    "qwen3_moe": (Qwen3MoeConfig(**SHARED, head_dim=16, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2,
                                 norm_topk_prob=True), torch.bfloat16, "qwen3moe"),
    "gemma3": (Gemma3TextConfig(**SHARED | dict(num_hidden_layers=7, num_attention_heads=2, num_key_value_heads=1,
                                                tie_word_embeddings=True), head_dim=32, sliding_window=16,
                                query_pre_attn_scalar=24,
                                rope_parameters={
                                    "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=2.0),
                                    "sliding_attention": dict(rope_type="default", rope_theta=1e4)}),
               torch.bfloat16, "gemma3"),
}


def randomize(model, norm_mean):
    """Weights large enough that every part of a layer matters to the logits, and not the last token alone."""
    embedding_std = 1.0 if not model.config.tie_word_embeddings else 0.05 if norm_mean == 0 else 0.125
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = norm_mean + 0.2 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.3 * noise
        elif "embed" in name:
            parameter.data = embedding_std * noise
        else:
            # Queries and keys are larger, so that attention is not an average.
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.data = gain * noise / math.sqrt(parameter.shape[-1])


def save(model, folder, dtype, num_shards):
    shutil.rmtree(folder, ignore_errors=True)
    num_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    model.to(dtype).save_pretrained(folder, max_shard_size=-(-num_bytes * 6 // 10) if num_shards == 2 else "1GB")
    assert len(list(folder.glob("*.safetensors"))) == num_shards


def older_spelling(folder):
    """Rewrites the config as published folders of Llama 3 have it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")


def permute(rows, num_heads):
    """llama.cpp's order of the rows of queries and keys."""
    head_dim = rows.shape[0] // num_heads
    return rows.reshape(num_heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def rope_factors(config):
    rope = config.rope_parameters
    head_dim = config.hidden_size // config.num_attention_heads
    for i in range(head_dim // 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (2 * i / head_dim)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            yield 1.0
        elif wavelength > low:
            yield rope["factor"]
        else:
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])
            yield 1 / ((1 - smooth) / rope["factor"] + smooth)


NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp"}
GEMMA_NAMES = NAMES | {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
                       "post_feedforward_layernorm": "post_ffw_norm"}


def gguf_tensors(model, arch):
    config, names = model.config, GEMMA_NAMES if arch == "gemma3" else NAMES
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch == "gemma3" and "norm" in name:
            values = values + np.float32(1)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            values = permute(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
                 "lm_head.weight": "output.weight"}
        if name in whole:
            yield whole[name], values
            continue
        _, _, layer, part = name.split(".", 3)
        if part == "mlp.experts.gate_up_proj":
            gate, up = np.split(values, 2, axis=1)
            yield f"blk.{layer}.ffn_gate_exps.weight", gate
            yield f"blk.{layer}.ffn_up_exps.weight", up
        elif part == "mlp.experts.down_proj":
            yield f"blk.{layer}.ffn_down_exps.weight", values
        else:
            part, kind = part.rsplit(".", 1)
            yield f"blk.{layer}.{names[part]}.{kind}", values
    if arch == "llama":
        yield "rope_freqs.weight", np.array(list(rope_factors(config)), dtype=np.float32)


def write_gguf(model, path, arch, is_bf16):
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_eos_token_id(config.eos_token_id)
    if arch == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["full_attention"]["factor"])
        writer.add_sliding_window(config.sliding_window)
        writer.add_attention_scale(config.query_pre_attn_scalar ** -0.5)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch in ("gemma3", "qwen3", "qwen3moe"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name, values in gguf_tensors(model, arch):
        if is_bf16 and values.ndim > 1:
            kind = gguf.GGMLQuantizationType.BF16
            packed = gguf.quantize(np.ascontiguousarray(values), kind)
            assert np.array_equal(gguf.dequantize(packed, kind), values), name
            writer.add_tensor(name, packed, raw_dtype=kind)
        else:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    torch.set_num_threads(1)
    for family, (config, dtype, arch) in FAMILIES.items():
        folder = HERE / "tiny" / family
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, norm_mean=0.0 if family == "gemma3" else 1.0)
        save(model, folder, dtype, num_shards=2 if family == "qwen3" else 1)
        if family == "llama3":
            older_spelling(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        if arch:
            write_gguf(model, folder / "model.gguf", arch, dtype == torch.bfloat16)
        generator = torch.Generator().manual_seed(11)
        prompts = []
        while len(prompts) < len(PROMPT_LENS):
            prompt_len = PROMPT_LENS[len(prompts)]
            prompt_ids = torch.randint(0, VOCAB_SIZE, (prompt_len,), generator=generator).tolist()
            greedy, gap, logits = golden_of(model, prompt_ids, NUM_GREEDY)
            if gap < MIN_GAP:
                continue
            print(f"{family}: {prompt_len} tokens, smallest gap {gap:.4f}, norm {logits[0]['norm']:.2f}: {greedy}")
            prompts.append({"token_ids": prompt_ids, "greedy": greedy, "smallest_gap": gap, "logits": logits})
        write(folder / "golden.json", {"prompts": prompts})


if __name__ == "__main__":
    main()
