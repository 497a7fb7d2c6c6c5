"""Writes data/offline-job.jsonl: 200 requests to write a brief about a news article, the job that peers are compared on.

Each line has `id`, the columns `system` and `user` that the chat template makes a prompt of, and `prompt`, the same
prompt with the markers of ChatML, for engines that take plain text: special tokens are parsed, none is added.
All requests share 331 tokens; the articles have 300 to 500. What is asked, and which articles each request joins,
is in offline_job.json. Needs nothing but Python and pip.
"""

import hashlib
import json
import pathlib
import re
import sys

import news

PLAN = pathlib.Path(__file__).with_suffix(".json")
OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "data" / "offline-job.jsonl"
SENTENCE_END = re.compile(r'(?<=[.!?"])\s+(?=[A-Z"])')


def requests(plan: dict, articles: list[str]):
    for parts, num_sentences in plan["requests"]:
        article = "\n".join(articles[part] for part in parts)
        if num_sentences is not None:
            article = " ".join(SENTENCE_END.split(article)[:num_sentences])
        user = plan["instructions"] + article
        prompt = (f"<|im_start|>system\n{plan['system']}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
                  "<|im_start|>assistant\n")
        yield {"id": parts[0], "system": plan["system"], "user": user, "prompt": prompt}


def main() -> None:
    plan = json.loads(PLAN.read_text())
    if not OUTPUT.exists():
        rows = list(requests(plan, news.articles()))
        digest = hashlib.sha256("\0".join(row["prompt"] for row in rows).encode()).hexdigest()
        if digest != plan["sha256"]:
            sys.exit(f"offline job: the prompts have SHA-256 {digest}, expected {plan['sha256']}")
        OUTPUT.parent.mkdir(exist_ok=True)
        partial = OUTPUT.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.replace(OUTPUT)
    print("offline job: data/offline-job.jsonl is there")


if __name__ == "__main__":
    main()
