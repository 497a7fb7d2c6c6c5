"""Continuous batching of Hugging Face transformers on the job of `tidemill bench engine`: random weights of a known shape
on a GPU, ragged prompts of arbitrary tokens, answers of full length. Nothing is downloaded.

Needs torch, transformers (5.24) and a GPU. Prints one line of JSON: the figures, or `not_run` with
the reason (exit code 3).
"""

import argparse
import inspect
import json
import random
import sys
import time

# As in pipeline/src/bench/gpu/workloads.rs, so that both are given the same lengths.
STRIDE = 7919
NUM_WARM = 8
# As Tidemill's on a GPU.
MAX_BATCH_TOKENS = 8192
# The sizes of the models, as in pipeline/src/bench/gpu/shapes.rs; how far positions are scaled costs no time.
SHAPES = {
    "qwen3-8b": ("Qwen3Config", dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=False)),
    "llama-3.1-8b": ("LlamaConfig", dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=5e5,
        tie_word_embeddings=False)),
    "smollm2-135m": ("LlamaConfig", dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=1e5,
        tie_word_embeddings=True)),
}


def ragged_len(mean, index, requests):
    return mean // 2 + index * STRIDE % requests * mean // (max(requests, 2) - 1)


def prompts(args, vocab_size):
    draw = random.Random(1)
    tokens = lambda length: [draw.randrange(vocab_size) for _ in range(length)]
    lens = (ragged_len(args.prompt_len, index, args.requests) for index in range(args.requests))
    return [tokens(length) for length in lens]


def not_run(reason):
    print(json.dumps({"not_run": reason}))
    sys.exit(3)


def make_model(args, attention):
    import torch
    import transformers

    name, sizes = SHAPES[args.shape]
    config = getattr(transformers, name)(**sizes)
    with torch.device(args.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16)
    return model.eval()


def manager_of(model, args, longest):
    """What `generate_batch` works with, kept over several batches: so neither its cache nor its CUDA graphs are made
    while the clock runs. Answers are of full length: no token has the number that ends one.
    """
    from transformers import GenerationConfig
    from transformers.generation import ContinuousBatchingConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    # To switch to flash attention would fetch a kernel.
    batching = ContinuousBatchingConfig(max_batch_tokens=MAX_BATCH_TOKENS, auto_switch_to_flash=False)
    return model.continuous_batching_context_manager(
        generation_config=GenerationConfig(
            max_new_tokens=args.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=batching,
        workload_hints=WorkloadHints(
            max_prompt_length=longest, max_generated_length=args.output_len, num_requests=args.requests))


def generate(manager, inputs):
    """The tokens of all answers."""
    manager.add_requests(inputs=inputs)
    num_finished, num_tokens = 0, 0
    while num_finished < len(inputs):
        answer = manager.get_result(timeout=1)
        if answer is None:
            if not manager.is_running():
                not_run("the peer ended before all were answered")
        elif answer.is_finished():
            num_finished += 1
            num_tokens += len(answer.generated_tokens)
    return num_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=3000, help="mean of the lengths")
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the script")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        not_run(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        not_run("torch sees no GPU")
    takes = inspect.signature(getattr(transformers.GenerationMixin, "continuous_batching_context_manager", lambda: None))
    if "workload_hints" not in takes.parameters:
        not_run(f"transformers {transformers.__version__} is too old, 5.24 has all that is used")
    from transformers.utils import is_flash_attn_2_available

    attention = "flash_attention_2" if args.device == "cuda" and is_flash_attn_2_available() else "sdpa"
    model = make_model(args, attention)
    inputs = prompts(args, model.config.vocab_size)
    # Others, so that nothing of them is in the cache already.
    warm = [tokens[::-1] for tokens in inputs[:NUM_WARM]]
    synchronize = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    with manager_of(model, args, max(map(len, inputs))) as manager:
        # Compiles what is left to compile.
        generate(manager, warm)
        synchronize()
        start = time.perf_counter()
        output_tokens = generate(manager, inputs)
        synchronize()
        seconds = time.perf_counter() - start
    prompt_tokens = sum(map(len, inputs))
    if output_tokens != args.requests * args.output_len:
        not_run(f"{output_tokens} tokens came out, {args.requests * args.output_len} were asked for")
    print(json.dumps({
        "peer": f"transformers {transformers.__version__}, {attention}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else args.device, "shape": args.shape, "requests": args.requests,
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "seconds": seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds, "output_tokens_per_second": output_tokens / seconds,
    }))


if __name__ == "__main__":
    main()
