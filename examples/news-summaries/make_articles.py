"""Writes data/articles.parquet from articles.jsonl, or shows that it is current.

The articles were written for this example; their places and people are invented. Two row groups let the source
stream, and `tags` is a list so that a nested column is seen to pass through unchanged.

    make_articles.py           write the file
    make_articles.py --check   exit with 1 if the file does not hold what articles.jsonl says
"""

import datetime
import json
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).resolve().parent
OUTPUT = HERE / "data" / "articles.parquet"
SCHEMA = pa.schema([
    pa.field("id", pa.int64(), nullable=False),
    pa.field("title", pa.string()),
    pa.field("body", pa.string()),
    pa.field("published", pa.date32()),
    pa.field("tags", pa.list_(pa.string())),
])


def read_articles() -> pa.Table:
    lines = (HERE / "articles.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        row["published"] = datetime.date.fromisoformat(row["published"])
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def main() -> int:
    table = read_articles()
    if "--check" in sys.argv[1:]:
        current = OUTPUT.exists() and pq.read_table(OUTPUT).equals(table)
        print(f"{OUTPUT.name} {'is current' if current else 'is stale: run make_articles.py'}")
        return 0 if current else 1
    OUTPUT.parent.mkdir(exist_ok=True)
    pq.write_table(table, OUTPUT, compression="zstd", row_group_size=24)
    print(f"wrote {table.num_rows} articles to {OUTPUT.relative_to(HERE)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
