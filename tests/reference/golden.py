"""What the scripts of this folder share: golden answers of a model in float32, and the files they are kept in."""
import json

import torch


def sample_of(logits):
    """The 16 largest logits, 48 spread over the vocabulary, and the norm of all."""
    top = torch.topk(logits, 16).indices.tolist()
    stride = logits.numel() // 48
    ids = top + [i * stride + stride // 2 for i in range(48)]
    return {"token_ids": ids, "logits": [float(f"{logits[i]:.6g}") for i in ids],
            "norm": float(torch.linalg.vector_norm(logits.double()))}


@torch.inference_mode()
def golden_of(model, prompt_ids, num_greedy):
    """Greedy tokens, the smallest gap between the best two logits, and the logits of the first and last step."""
    greedy, gaps, cache = [], [], None
    step_ids = torch.tensor([prompt_ids])
    for _ in range(num_greedy):
        out = model(input_ids=step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, row = out.past_key_values, out.logits[0, -1]
        top = torch.topk(row, 2).values
        gaps.append(float(top[0] - top[1]))
        greedy.append(int(torch.argmax(row)))
        step_ids = torch.tensor([[greedy[-1]]])
    # The logits are taken from one pass over everything, without a cache, so that the cache is checked too.
    rows = model(input_ids=torch.tensor([prompt_ids + greedy]), use_cache=False, logits_to_keep=num_greedy + 1).logits[0]
    assert [int(i) for i in rows[:-1].argmax(dim=-1)] == greedy
    return greedy, min(gaps), [dict(step=step, **sample_of(rows[step])) for step in (0, num_greedy - 1)]


def write(path, value):
    lines = json.dumps(value, ensure_ascii=True)
    # One case a line, so that a change is read as one.
    for start in ('{"messages":', '{"text":', '{"token_ids": [', '"greedy":'):
        lines = lines.replace(start, "\n" + start)
    path.write_text(lines + "\n")
