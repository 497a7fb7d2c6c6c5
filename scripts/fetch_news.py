"""Writes data/articles.parquet: 300 real news articles for trying out pipelines."""

import os
import pathlib
import re

import pyarrow as pa
import pyarrow.parquet as pq

import news

MAX_TITLE_WORDS = 12
OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "data" / "articles.parquet"


def title_of(body: str) -> str:
    """The first sentence if it is short, else its first words."""
    sentence = re.split(r"(?<=[.!?])\s", body, maxsplit=1)[0]
    words = sentence.split()
    if len(words) <= MAX_TITLE_WORDS:
        return " ".join(words).rstrip(".")
    return " ".join(words[:MAX_TITLE_WORDS]) + " …"


def is_current() -> bool:
    try:
        return pq.read_metadata(OUTPUT).num_rows == news.NUM_ARTICLES
    except (OSError, pa.ArrowInvalid):
        return False


def main() -> None:
    if is_current():
        print("data: data/articles.parquet is there")
        return
    bodies = news.articles()
    table = pa.table({
        "id": pa.array(range(1, len(bodies) + 1), pa.int64()),
        "title": pa.array([title_of(body) for body in bodies], pa.string()),
        "body": pa.array(bodies, pa.string()),
    })
    OUTPUT.parent.mkdir(exist_ok=True)
    # Renamed into place, so that an interrupted run leaves no half file.
    partial = OUTPUT.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd", row_group_size=64)
    os.replace(partial, OUTPUT)
    print(f"data: wrote {len(bodies)} articles to data/articles.parquet")


if __name__ == "__main__":
    main()
