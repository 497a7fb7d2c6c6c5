#!/usr/bin/env python3
"""Writes the golden files of real models with Hugging Face transformers, the reference Tidemill is held to.

    pip install torch transformers gguf accelerate
    python tests/reference/make_golden.py smollm2-135m SmolLM2-135M-Instruct.Q4_1.gguf
    python tests/reference/make_golden.py gemma-3-270m gemma-3-270m.Q4_K_M.gguf

`NAME.json`: prompts, greedy tokens and samples of the logits, in float32, on the dequantized weights.

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

from golden import golden_of, write

HERE = pathlib.Path(__file__).parent
NUM_GREEDY = 32
SYSTEM = "You are a news editor."
SUMMARIZE = "Summarize this article in one sentence.\n"

# News texts written for this test. The first four share a long prefix, the next two another one.
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
    (SYSTEM, SUMMARIZE + "A fire destroyed the roof of a paper mill near Tampere on Sunday night. Nobody was hurt. The cause is not "
     "known yet, and the owner hopes to start one of the two machines again within a month."),
    (None, "Is this headline good news or bad news? Answer with one word.\nBeavers return to the river after 200 years."),
    (None, "List the numbers in this text.\nThe bridge is 412 meters long, cost 38 million and opened 3 years late."),
    ("You answer in German.", "Translate the headline: Farmers block the motorway for a second day."),
    ("You sort news into topics.", "Name the topic: sport, politics, science or business.\nThe central bank left its rate at 2.5 "
     "percent and said that prices rose more slowly than it had feared."),
    (None, "Who is the article about?\nAda Okafor, who taught mathematics in Lagos for forty years, has won the national prize for "
     "teachers. Her pupils say that she never once raised her voice."),
    (SYSTEM, "Write a headline for this article.\nThe last lamplighter of the old town has handed over his ladder. From next week the "
     "112 gas lamps of the quarter light themselves; the gas stays, after residents collected 9,000 signatures for it."),
    (None, "Complete the sentence: The ferry between the two islands was canceled because"),
    (None, "def mean(values):\n    \"\"\"The arithmetic mean.\"\"\"\n"),
]
# All texts above, there and back, in one prompt of more than a thousand tokens.
TEXTS = [user.split("\n", 1)[-1] for _, user in PROMPTS]
PROMPTS.append((None, "Write one sentence about each of these articles.\n\n" + "\n\n".join(TEXTS + TEXTS[::-1])))


def load_tokenizer(path):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if "SmolLM2" in path.name:
        # The published tokenizer splits digits; transformers does not read `tokenizer.ggml.pre = smollm` from a GGUF.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ])
        tokenizer.backend_tokenizer.normalizer = None
    return tokenizer


NAMES = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
GEMMA_NAMES = NAMES | {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
                       "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                       "post_ffw_norm": "post_feedforward_layernorm"}


def check_weights(model, reader):
    """Panics unless every tensor of the model is the dequantized tensor of the GGUF."""
    config, state, seen = model.config, model.state_dict(), set()
    is_gemma = config.model_type.startswith("gemma")
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{(GEMMA_NAMES if is_gemma else NAMES)[kind]}.weight"
            if kind in ("attn_q", "attn_k") and not is_gemma:
                # llama.cpp interleaves the two halves of each head; undo it.
                num_heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
                rows, columns = values.shape
                values = values.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
        if is_gemma and "norm" in tensor.name:
            values = values - np.float32(1)
        actual = state[name].numpy()
        assert actual.dtype == np.float32, name
        assert np.array_equal(actual, values), name
        seen.add(name)
    assert set(state) - seen <= {"lm_head.weight"}, set(state) - seen
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    print(f"{len(seen)} tensors equal the dequantized GGUF")


def prompt_of(tokenizer, system, user):
    """The prompt for the log and its token ids; a model without a template continues the text."""
    if tokenizer.chat_template is None:
        text = "\n".join(filter(None, [system, user]))
        return text, tokenizer(text)["input_ids"]
    messages = ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": user}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["smollm2-135m", "gemma-3-270m"])
    parser.add_argument("gguf", type=pathlib.Path)
    args = parser.parse_args()
    path = args.gguf.resolve()
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager").eval()
    check_weights(model, gguf.GGUFReader(path))
    prompts = []
    for system, user in PROMPTS:
        text, prompt_ids = prompt_of(tokenizer, system, user)
        greedy, gap, logits = golden_of(model, prompt_ids, NUM_GREEDY)
        print(f"{len(prompt_ids)} tokens, smallest gap of the best two logits {gap:.4f}: {tokenizer.decode(greedy)!r}")
        prompts.append({"text": text, "token_ids": prompt_ids, "greedy": greedy, "smallest_gap": gap, "logits": logits})
    write(HERE / f"{args.name}.json", {"gguf_sha256": sha256, "prompts": prompts})


if __name__ == "__main__":
    main()
