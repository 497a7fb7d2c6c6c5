#!/usr/bin/env python3
"""Writes the golden files of this folder with Hugging Face transformers, the reference Tidemill is held to.

    pip install torch transformers gguf accelerate
    python tests/reference/make_golden.py SmolLM2-135M-Instruct.Q4_1.gguf

`smollm2-135m.json`: prompts, greedy tokens and samples of the logits, in float32, on the dequantized weights.

The script first checks that what transformers loaded is the GGUF, dequantized by the `gguf` package, number for
number, so that the golden logits are those of the same weights that Tidemill reads.
"""
import argparse
import hashlib
import json
import pathlib

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = pathlib.Path(__file__).parent
NUM_GREEDY = 32
SYSTEM = "You are a news editor."
SUMMARIZE = "Summarize this article in one sentence.\n"

# Short news texts written for this test. The first four share a long prefix, the next two another one.
PROMPTS = [
    (SYSTEM, SUMMARIZE + "The town council of Port Ellery voted on Tuesday to rebuild the old harbor wall, which was damaged "
     "in the January storms. Work begins in May and should take two years."),
    (SYSTEM, SUMMARIZE + "The town council of Port Ellery voted on Tuesday to rebuild the old harbor wall, which was damaged "
     "in the January storms. Fishermen asked for a wider entrance instead."),
    (SYSTEM, SUMMARIZE + "The town council of Port Ellery voted on Wednesday to close the swimming pool until the roof is safe."),
    (SYSTEM, SUMMARIZE + "Engineers in northern Sweden have switched on a battery the size of a football field. It stores "
     "wind power at night and feeds it back in the morning, when demand is highest."),
    (None, "Which city is this article about? Answer with one word.\nCommuters in Lisbon faced long delays on Monday after a "
     "fault closed two metro lines for six hours."),
    (None, "Which city is this article about? Answer with one word.\nThe museum of Krakow opened a new wing on Friday, with "
     "more than 300 paintings never shown before."),
    ("You sort news into topics.", "Name the topic: sport, politics, science or business.\nThe striker scored twice in the last "
     "ten minutes, and the visitors left with a 3-2 win that puts them top of the league."),
    ("You answer in French.", "Translate the headline: Heavy rain floods the valley, 1,200 people leave their homes."),
    (None, "Write three keywords for this text.\nResearchers measured how fast glaciers in the Alps lost ice between 2000 and "
     "2023. The loss was 39 percent, and it is speeding up."),
    (SYSTEM, SUMMARIZE + "The national railway said on Thursday that it will order ninety new trains for its regional lines, the "
     "largest purchase in its history. The first trains are expected in three years and will replace carriages that have been "
     "running since 1984. Each train has room for 420 passengers, wheelchair spaces at every second door and windows that can be "
     "opened when the cooling fails, as it often did last summer. The contract is worth 1.3 billion euros and was won by a "
     "company from the south of the country, which promised to build a second factory and to hire 800 workers. Unions welcomed "
     "the order but warned that there are too few drivers for the trains that run today. A spokeswoman for the railway said that "
     "a new school for drivers opens in the autumn. The opposition called the plan late and expensive, and asked why older lines "
     "in the mountains, where buses have replaced trains for a decade, are not part of it."),
]


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The published tokenizer splits digits; transformers does not read `tokenizer.ggml.pre = smollm` from a GGUF.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
    ])
    tokenizer.backend_tokenizer.normalizer = None
    return tokenizer


def check_weights(model, reader, config):
    """Panics unless every tensor of the model is the dequantized tensor of the GGUF."""
    state = model.state_dict()
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
             "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
             "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    seen = set()
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{names[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                # llama.cpp interleaves the two halves of each head; undo it.
                num_heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                rows, columns = values.shape
                values = values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        actual = state[name].numpy()
        assert actual.dtype == np.float32, name
        assert np.array_equal(actual, values), name
        seen.add(name)
    assert set(state) - seen <= {"lm_head.weight"}, set(state) - seen
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    print(f"{len(seen)} tensors equal the dequantized GGUF")


def sample_of(logits):
    """The 16 largest logits, 48 spread over the vocabulary, and the norm of all."""
    top = torch.topk(logits, 16).indices.tolist()
    stride = logits.numel() // 48
    ids = top + [i * stride + 7 for i in range(48)]
    return {"token_ids": ids, "logits": [float(f"{logits[i]:.6g}") for i in ids],
            "norm": float(torch.linalg.vector_norm(logits.double()))}


@torch.inference_mode()
def golden_of(model, prompt_ids):
    greedy, gaps, cache = [], [], None
    step_ids = torch.tensor([prompt_ids])
    for _ in range(NUM_GREEDY):
        out = model(input_ids=step_ids, past_key_values=cache, use_cache=True)
        cache, row = out.past_key_values, out.logits[0, -1]
        top = torch.topk(row, 2).values
        gaps.append(float(top[0] - top[1]))
        greedy.append(int(torch.argmax(row)))
        step_ids = torch.tensor([[greedy[-1]]])
    # The logits are taken from one pass over everything, without a cache, so that the cache is checked too.
    rows = model(input_ids=torch.tensor([prompt_ids + greedy]), use_cache=False).logits[0]
    at = len(prompt_ids) - 1
    assert [int(i) for i in rows[at:-1].argmax(dim=-1)] == greedy
    return greedy, min(gaps), [dict(step=step, **sample_of(rows[at + step])) for step in (0, NUM_GREEDY - 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=pathlib.Path)
    path = parser.parse_args().gguf.resolve()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    check_weights(model, gguf.GGUFReader(path), model.config)
    prompts = []
    for system, user in PROMPTS:
        messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        greedy, gap, logits = golden_of(model, prompt_ids)
        print(f"{len(prompt_ids)} tokens, smallest gap of the best two logits {gap:.4f}: {tokenizer.decode(greedy)!r}")
        prompts.append({"messages": messages, "text": text, "token_ids": prompt_ids, "greedy": greedy,
                        "smallest_gap": gap, "logits": logits})
    write("smollm2-135m.json", {"gguf_sha256": sha256, "prompts": prompts})


def write(name, value):
    lines = json.dumps(value, ensure_ascii=True)
    # One case a line, so that a change is read as one.
    lines = lines.replace('{"messages":', '\n{"messages":')
    (HERE / name).write_text(lines + "\n")


if __name__ == "__main__":
    main()
