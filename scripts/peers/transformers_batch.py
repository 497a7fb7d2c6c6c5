"""Continuous batching of Hugging Face transformers on the job of `tidemill bench engine`: random weights of a known shape
on a GPU, ragged prompts of arbitrary tokens, answers of full length. Nothing is downloaded.

Needs torch and transformers with `generate_batch`, and a GPU. Prints one line of JSON: the figures, or `not_run` with
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
# The configurations of the models, as in pipeline/src/bench/gpu/shapes.rs.
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
    shared = tokens(args.shared_len)
    lens = (ragged_len(args.prompt_len, index, args.requests) for index in range(args.requests))
    return [shared + tokens(length - args.shared_len) for length in lens]


def not_run(reason):
    print(json.dumps({"not_run": reason}))
    sys.exit(3)


def make_model(shape, attention):
    import torch
    import transformers

    name, sizes = SHAPES[shape]
    config = getattr(transformers, name)(**sizes)
    # The name of this argument has changed.
    dtype = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, **{dtype: torch.bfloat16})
    return model.eval()


def generate(model, inputs, args):
    """Answers of full length: no token has the number that ends one."""
    from transformers import GenerationConfig

    wanted = {"max_batch_tokens": args.max_batch_tokens}
    config = GenerationConfig(max_new_tokens=args.output_len, do_sample=False, eos_token_id=-1, pad_token_id=0)
    takes = inspect.signature(model.generate_batch).parameters
    more = {}
    if "continuous_batching_config" in takes:
        from transformers.generation import ContinuousBatchingConfig

        more["continuous_batching_config"] = ContinuousBatchingConfig(**wanted)
    else:
        for name, value in wanted.items():
            setattr(config, name, value)
    if "progress_bar" in takes:
        more["progress_bar"] = False
    answers = model.generate_batch(inputs=inputs, generation_config=config, **more)
    return sum(len(answer.generated_tokens) for answer in answers.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=3000, help="mean of the lengths")
    parser.add_argument("--shared-len", type=int, default=0)
    parser.add_argument("--output-len", type=int, default=200)
    parser.add_argument("--max-batch-tokens", type=int, default=8192)
    parser.add_argument("--attention", help="flash_attention_2 where it is installed, else sdpa")
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        not_run(str(error))
    if not torch.cuda.is_available():
        not_run("torch sees no GPU")
    if not hasattr(transformers.GenerationMixin, "generate_batch"):
        not_run(f"transformers {transformers.__version__} has no generate_batch")
    if not args.attention:
        from transformers.utils import is_flash_attn_2_available

        args.attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    model = make_model(args.shape, args.attention)
    inputs = prompts(args, model.config.vocab_size)
    # Compiles, captures and allocates.
    generate(model, inputs[:NUM_WARM], args)
    torch.cuda.synchronize()
    start = time.perf_counter()
    output_tokens = generate(model, inputs, args)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    prompt_tokens = sum(map(len, inputs))
    if output_tokens != args.requests * args.output_len:
        not_run(f"{output_tokens} tokens came out, {args.requests * args.output_len} were asked for")
    print(json.dumps({
        "peer": f"transformers {transformers.__version__}, {args.attention}, torch {torch.__version__}",
        "device": torch.cuda.get_device_name(), "shape": args.shape, "requests": args.requests,
        "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "seconds": seconds,
        "prompt_tokens_per_second": prompt_tokens / seconds, "output_tokens_per_second": output_tokens / seconds,
    }))


if __name__ == "__main__":
    main()
