#!/usr/bin/env python3
"""Writes `quants/`: the golden files that hold every weight type to the `gguf` package and to transformers.

    pip install torch transformers gguf
    python tests/reference/make_golden_quants.py

`TYPE.bin`: some random blocks of the type, followed by the numbers they stand for as little-endian f32.
`TYPE.gguf`: a tiny random Llama whose matrices are of that type wherever their rows are whole blocks, else Q8_0.
`logits.json`: float32 logits of each model on its dequantized weights, after a prompt of random tokens.
"""
import json
import pathlib

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = pathlib.Path(__file__).parent / "quants"
NUM_BLOCKS = 4
VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, THETA, EPSILON = 128, 2, 2, 1, 32, 64, 10000.0, 1e-5
# Where the f16 numbers of a block lie; the typical size of each makes the weights about as large as trained ones.
SCALES = {
    Type.Q8_0: {0: 1e-3}, Type.Q4_0: {0: 1e-2}, Type.Q4_1: {0: 1e-2, 2: -7.5e-2}, Type.Q5_0: {0: 5e-3},
    Type.Q5_1: {0: 5e-3, 2: -7.7e-2}, Type.Q4_K: {0: 3e-4, 2: 2.2e-3}, Type.Q5_K: {0: 1.5e-4, 2: 2.3e-3},
    Type.Q6_K: {208: 4e-5},
}
TYPES = [Type.F32, Type.F16, Type.BF16, *SCALES]


def random_rows(rng, kind, rows, columns):
    """Random bytes of a type, with scales that are sane."""
    if kind == Type.F32:
        return rng.normal(0, 0.08, (rows, columns)).astype(np.float32).view(np.uint8)
    if kind == Type.F16:
        return rng.normal(0, 0.08, (rows, columns)).astype(np.float16).view(np.uint8)
    if kind == Type.BF16:
        values = rng.normal(0, 0.08, (rows, columns)).astype(np.float32)
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (rows * columns // block_len, block_bytes), dtype=np.uint8)
    for at, size in SCALES[kind].items():
        scale = (size * rng.uniform(0.5, 1.5, (len(blocks), 1))).astype(np.float16)
        blocks[:, at:at + 2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantize(data, kind):
    """The `gguf` package's numbers; it knows the plain formats by array type only."""
    plain = {Type.F32: np.float32, Type.F16: np.float16}
    return gguf.dequantize(data.view(plain[kind]) if kind in plain else data, kind).astype(np.float32)


def write_blocks(rng, kind):
    block_len = gguf.GGML_QUANT_SIZES[kind][0]
    data = random_rows(rng, kind, 1, NUM_BLOCKS * block_len)
    values = dequantize(data, kind)
    (FOLDER / f"{kind.name}.bin").write_bytes(data.tobytes() + values.astype("<f4").tobytes())


def split_halves(values, num_heads):
    """Undoes llama.cpp's interleaving of the two halves of each head."""
    rows, columns = values.shape
    return values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@torch.inference_mode()
def write_model(rng, kind):
    hidden = max(64, gguf.GGML_QUANT_SIZES[kind][0])
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=hidden, intermediate_size=INTERMEDIATE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, max_position_embeddings=128, rms_norm_eps=EPSILON,
        rope_theta=THETA, tie_word_embeddings=True, attn_implementation="eager")
    writer = gguf.GGUFWriter(FOLDER / f"{kind.name}.gguf", "llama")
    for add, value in [
        (writer.add_vocab_size, VOCAB), (writer.add_embedding_length, hidden), (writer.add_feed_forward_length, INTERMEDIATE),
        (writer.add_block_count, LAYERS), (writer.add_head_count, HEADS), (writer.add_head_count_kv, KV_HEADS),
        (writer.add_key_length, HEAD_DIM), (writer.add_value_length, HEAD_DIM), (writer.add_context_length, 128),
        (writer.add_rope_freq_base, THETA), (writer.add_layer_norm_rms_eps, EPSILON),
    ]:
        add(value)
    state = {}

    def matrix(name, target, rows, columns, heads=None):
        actual = kind if columns % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.Q8_0
        data = random_rows(rng, actual, rows, columns)
        writer.add_tensor(name, data, raw_dtype=actual)
        values = dequantize(data, actual).reshape(rows, columns)
        state[target] = torch.from_numpy(split_halves(values, heads) if heads else values)

    def norm(name, target):
        values = rng.uniform(0.5, 1.5, hidden).astype(np.float32)
        writer.add_tensor(name, values)
        state[target] = torch.from_numpy(values)

    matrix("token_embd.weight", "model.embed_tokens.weight", VOCAB, hidden)
    norm("output_norm.weight", "model.norm.weight")
    for layer in range(LAYERS):
        ours, theirs = f"blk.{layer}.", f"model.layers.{layer}."
        norm(ours + "attn_norm.weight", theirs + "input_layernorm.weight")
        norm(ours + "ffn_norm.weight", theirs + "post_attention_layernorm.weight")
        query_rows, kv_rows = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
        matrix(ours + "attn_q.weight", theirs + "self_attn.q_proj.weight", query_rows, hidden, HEADS)
        matrix(ours + "attn_k.weight", theirs + "self_attn.k_proj.weight", kv_rows, hidden, KV_HEADS)
        matrix(ours + "attn_v.weight", theirs + "self_attn.v_proj.weight", kv_rows, hidden)
        matrix(ours + "attn_output.weight", theirs + "self_attn.o_proj.weight", hidden, query_rows)
        matrix(ours + "ffn_gate.weight", theirs + "mlp.gate_proj.weight", INTERMEDIATE, hidden)
        matrix(ours + "ffn_up.weight", theirs + "mlp.up_proj.weight", INTERMEDIATE, hidden)
        matrix(ours + "ffn_down.weight", theirs + "mlp.down_proj.weight", hidden, INTERMEDIATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    token_ids = rng.integers(0, VOCAB, 24).tolist()
    logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0, -1]
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()
    print(f"{kind.name}: logits of norm {float(torch.linalg.vector_norm(logits)):.3g}")
    return {"type": kind.name, "token_ids": token_ids, "logits": [float(f"{value:.7g}") for value in logits.tolist()]}


def main():
    FOLDER.mkdir(exist_ok=True)
    cases = []
    for kind in TYPES:
        rng = np.random.default_rng(kind.value)
        write_blocks(rng, kind)
        cases.append(write_model(rng, kind))
    lines = ",\n".join(json.dumps(case) for case in cases)
    (FOLDER / "logits.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
